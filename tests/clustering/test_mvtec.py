"""The table of MVTec AD, on a tiny tree in its layout."""

import csv

import numpy as np
import pytest
from PIL import Image

from anomalymatch.clustering.mvtec import write_benchmark
from anomalymatch.errors import ConfigError, DataError


@pytest.fixture
def tree(tmp_path):
    """Two categories: good images, bright squares, dark squares; and a folder of combined ones, which counts not."""
    rng = np.random.default_rng(0)
    for category in ("bottle", "wood"):
        for part in ("train/good", "test/good", "test/bright", "test/dark", "test/combined"):
            folder = tmp_path / "mvtec" / category / part
            folder.mkdir(parents=True)
            for number in range(5):
                image = rng.integers(100, 140, (32, 32, 3), dtype=np.uint8)
                image[8:18, 8:18] = {"bright": 255, "dark": 0}.get(folder.name, 120)
                Image.fromarray(image).save(folder / f"{number:03d}.png")
        mask = tmp_path / "mvtec" / category / "ground_truth" / "dark"
        mask.mkdir(parents=True)
    return tmp_path / "mvtec"


def test_the_table_has_every_category_and_the_means(tree, make_patches, spec, tmp_path):
    rows = write_benchmark(tmp_path / "out", str(tree), make_patches, spec, seed=0)
    with (tmp_path / "out" / "mvtec.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["category"] for line in lines] == [
        *["bottle"] * 3, *["wood"] * 3, *["mean of 1 objects"] * 3, *["mean of 1 textures"] * 3
    ]  # fmt: skip
    assert {line["method"] for line in lines} == {"average", "unsupervised", "normals"}
    assert all(line["images"] == "15" and line["types"] == "3" for line in lines)
    assert [row["nmi"] for row in rows if row["category"] == "bottle"] == [
        row["nmi"] for row in rows if row["category"] == "mean of 1 objects"
    ]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Missing categories: cable, capsule" in report
    assert "leather, tile." in report


def test_without_any_category_it_says_what_was_expected(tmp_path, make_patches, spec):
    with pytest.raises(DataError, match="categories of MVTec AD"):
        write_benchmark(tmp_path / "out", str(tmp_path), make_patches, spec, seed=0)
    with pytest.raises(ConfigError, match=r"benchmark=mvtec needs data\.root"):
        write_benchmark(tmp_path / "out", None, make_patches, spec, seed=0)
