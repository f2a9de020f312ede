"""The command, as a user meets it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anomalymatch import cluster as module

TINY = [
    "model.name=test_efficientnet",
    "model.weights=none",
    "dataset.image_size=32",
    "clustering.patches.levels=[2,3]",
    "clustering.patches.components=6",
    "inference.device=cpu",
    "inference.workers=1",
    "logger=none",
]


@pytest.fixture
def images(tmp_path):
    """Three kinds of image, four of each, of many shapes: colour, grey, 16 bits; and one that is damaged."""
    rng = np.random.default_rng(0)
    for kind, value in (("bright", 250), ("dark", 5), ("plain", 120)):
        folder = tmp_path / "images" / kind
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(100, 140, (30 + 9 * number, 60 - 7 * number), dtype=np.uint8)
            pixels[8:20, 8:20] = value
            if number == 1:
                pixels = pixels.astype(np.uint16) * 257
            if number == 2:
                pixels = np.stack([pixels] * 3, axis=2)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "images" / "plain" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((tmp_path / "images" / "plain" / "0.png").read_bytes())
    return tmp_path / "images"


@pytest.fixture
def tiny(tmp_path):
    return [*TINY, f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture
def call(call_in_folder):
    return call_in_folder(module.main)


def test_a_folder_is_grouped_named_and_labelled(call, tiny, images, tmp_path):
    words = ["dataset=folder", f"data.root={images}", "clusters=3", *tiny]
    code, out, err = call(*words)
    assert (code, out) == (0, ""), err
    folder = tmp_path / "work" / "groups" / "images"
    table = pq.read_table(folder / "clusters.parquet")
    assert table.column_names == ["id", "cluster", "distance", "best_weight"]
    assert len(table) == 12
    assert set(table["cluster"].to_pylist()) == {0, 1, 2}
    assert pq.read_table(folder / "rejects.parquet")["id"].to_pylist() == ["plain/damaged.png"]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Group 2" in report
    assert "NMI" in report
    assert sorted(path.name for path in (folder / "sheets").iterdir()) == [f"group-00{k}.png" for k in range(3)]
    groups = folder / "groups.csv"
    groups.write_text(groups.read_text().replace("\n0,,", "\n0,ring,"))
    code, _, err = call(f"names={groups}")
    assert code == 0, err
    named = (folder / "labels_by_group.csv").read_text().splitlines()
    assert len(named) == 1 + table["cluster"].to_pylist().count(0)
    assert all(line.endswith(",anomaly,ring") for line in named[1:])
    assert "groups.csv" in call(*words).error_line


def test_the_number_of_groups_is_chosen_and_old_sheets_are_removed(tiny, images, tmp_path, caplog):
    words = ["dataset=folder", f"data.root={images}", f"output={tmp_path / 'out'}", *tiny]
    module.cluster(*words, "clusters=5")
    folder = module.cluster(*words, "clustering.spec.most_groups=3")
    assert folder == tmp_path / "out"
    assert len(list((folder / "sheets").iterdir())) in (2, 3)
    assert (folder / "plots" / "choice.png").is_file()


def test_a_run_provides_its_top_its_labels_and_its_normals(command, call, probe_job, tiny, tmp_path, without_pictures):
    done = command(*probe_job, "al.cycles=1", "hydra.run.dir=run")
    assert done.code == 0, done.err
    run = tmp_path / "run" if (tmp_path / "run").exists() else tmp_path / "work" / "run"
    cache = next(word for word in probe_job if word.startswith("data.cache_dir"))
    words = [f"run={run}", cache, *TINY]
    folder = module.cluster(*words, "top=12", "clusters=2", f"output={tmp_path / 'top'}")
    assert len(pq.read_table(folder / "clusters.parquet")) == 12
    assert "labelled normals" in (folder / "report.html").read_text(encoding="utf-8")
    folder = module.cluster(*words, "labelled=anomaly", "clusters=2", f"output={tmp_path / 'labelled'}")
    ids = pq.read_table(folder / "clusters.parquet")["id"].to_pylist()
    labels = dict(line.split(",")[:2] for line in (run / "labels.csv").read_text().splitlines()[1:])
    assert ids == sorted(id_ for id_, label in labels.items() if label == "anomaly")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data.root=PATH"),
        (["+experiment=clustering_mvtec"], "data.root=PATH"),
        (["run=nowhere"], "run=nowhere"),
        (["data.root=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.root={images}", "clusters=99"], "clusters is 99"),
        (["data.root={images}/plain", "clusters=1", "map=tsne"], "map is 'tsne'"),
        (["data.root={images}", "labelled=anomaly"], "labelled needs run=RUN"),
        (["data.root={images}", "labelled=odd"], "labelled is 'odd'"),
        (["data.root={images}", "benchmark=coco"], "benchmark is 'coco'"),
        (["data.root={images}", "seed=-1"], "seed is -1"),
        (["data.root={images}", "clustering.spec.tau=-1.0"], "clustering.spec.tau is -1"),
        (["data.root={images}", "clustering.spec.tua=1"], "did you mean clustering.spec.tau?"),
        (["data.root={images}", "clustering.patches.levels=[7]"], "no such feature maps"),
        (["names=nowhere.csv"], "names=nowhere.csv"),
        (["data.root={images}/../one"], "got 1"),
        (["data.root={images}", "output=/proc/nowhere", "clusters=2"], "/proc/nowhere"),
    ],
)
def test_errors_are_one_line(call, tiny, images, words, message):
    assert message in call("dataset=folder", *tiny, *(word.format(images=images) for word in words)).error_line
