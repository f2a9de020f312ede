"""Tests of what sources of encoded images share: bands of TIFF files, transparency and limits."""

import io
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from pictures import png, write_tar, write_zip
from PIL import Image as PillowImage

from anomalymatch.data.convert import convert
from anomalymatch.data.open import open_path
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources import encoded
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.data.stream import next_readable, resize, scale, stream
from anomalymatch.errors import ConfigError
from anomalymatch.types import Reject

NAMES = ("coastal", "blue", "green", "red", "nir")
STACK = np.random.default_rng(0).integers(0, 4000, (3, 6, 8, 5), dtype=np.uint16)


def tiff(array: np.ndarray, names: tuple[str, ...] = ()) -> bytes:
    items = "".join(f'<Item sample="{n}" role="description">{name}</Item>' for n, name in enumerate(names))
    tags: Any = [(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)] if names else []
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="minisblack", planarconfig="contig", extratags=tags)
    return buffer.getvalue()


FILES = {
    "a.tif": tiff(STACK[0], NAMES),
    "b.tif": tiff(STACK[1][..., ::-1], NAMES[::-1]),
    "c.tif": tiff(STACK[2]),
    "d.tif": tiff(STACK[2][..., :4]),
    "e.tif": png(),
}


def write_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(data)
    return str(root / "in")


def write_parquet(root: Path, files: dict[str, bytes]) -> str:
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": images}), root / "a.parquet")
    return str(root / "a.parquet")


KINDS: dict[str, Callable[[Path, dict[str, bytes]], str]] = {
    "folder": write_folder,
    "zip": lambda root, files: str(write_zip(root / "a.zip", files)),
    "tar": lambda root, files: str(write_tar(root / "a.tar", files)),
    "parquet": write_parquet,
}


@pytest.fixture(params=[*KINDS, "remote"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, memory: Any) -> Callable[..., Any]:
    """Function that writes image files in one format and opens them."""

    calls = count()

    def make(files: dict[str, bytes], **options: Any) -> Any:
        folder = tmp_path / str(next(calls))
        folder.mkdir()
        if request.param != "remote":
            place = KINDS[request.param](folder, files)
        else:
            place = "memory://set"
            for name, data in files.items():
                memory.pipe(f"/set/{name}", data)
        return open_path(place, cache_dir=tmp_path / "cache", **options)

    return make


def test_bands_by_name(opened: Callable[..., Any]) -> None:
    source = opened(FILES)
    assert source.bands == NAMES
    for n in range(3):
        np.testing.assert_array_equal(source.pixels(source.ids[n]), STACK[n])
    images = source.read(source.ids)
    assert images[0].shape == (6, 8, 5)
    assert [image.reason for image in images[3:]] == [
        f"it has 4 bands instead of 5: {', '.join(NAMES)}",
        f"it is no TIFF, so it cannot have the 5 bands {', '.join(NAMES)}",
    ]
    rendering = Rendering(combine={"red": {"red": 1}, "ndvi": {"nir": 1, "red": -1}})
    combined = opened(FILES, rendering=rendering)
    assert combined.channels == 2
    np.testing.assert_array_equal(combined.read(source.ids[1:2])[0], rendering(STACK[1], NAMES))


def test_bands_named_by_the_user(opened: Callable[..., Any]) -> None:
    source = opened(FILES, bands=["u", "g", "r", "i", "z"])
    assert source.bands == ("u", "g", "r", "i", "z")
    np.testing.assert_array_equal(source.pixels(source.ids[0]), STACK[0])
    with pytest.raises(ConfigError, match=r"dataset\.source\.bands"):
        opened(FILES, bands=["u", "u"])


def test_bands_are_numbered_and_looked_for_behind_damaged_files(opened: Callable[..., Any]) -> None:
    source = opened({"0.tif": b"damaged", "c.tif": FILES["c.tif"]})
    assert source.bands == ("band0", "band1", "band2", "band3", "band4")
    assert isinstance(source.read(source.ids)[0], Reject)
    assert opened({"0.tif": tiff(STACK[0, ..., 0]), "c.tif": FILES["c.tif"]}).bands == ("red", "green", "blue")


def test_background_of_transparent_images(opened: Callable[..., Any]) -> None:
    buffer = io.BytesIO()
    PillowImage.fromarray(np.array([[[90, 60, 30, 0], [90, 60, 30, 255]]], np.uint8)).save(buffer, "PNG")
    files = {"a.png": buffer.getvalue()}
    black, blue = opened(files), opened(files, channels_background=[0, 0, 200])
    assert black.pixels(black.ids[0]).tolist() == [[[0, 0, 0], [90, 60, 30]]]
    assert blue.pixels(blue.ids[0]).tolist() == [[[0, 0, 200], [90, 60, 30]]]
    for wrong in ([1, 2], 256, -1):
        with pytest.raises(ConfigError, match=r"dataset\.source\.channels_background"):
            opened(files, channels_background=wrong)


def test_limits_of_pixels_and_bytes(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.png": png(1, 10, 12)}
    source = opened(files, max_pixels=119)
    assert "12 x 10 pixels" in source.read(source.ids)[0].reason
    with pytest.raises(ConfigError, match=r"dataset\.source\.max_pixels is 0"):
        opened(files, max_pixels=0)
    monkeypatch.setattr(encoded, "MAX_BYTES", 20)
    source = opened(files)
    assert "more than 20" in source.read(source.ids)[0].reason


def test_options_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(FILES["a.tif"])
    (tmp_path / "b.tif").write_bytes(FILES["b.tif"])
    options = ({}, {"bands": list("ugriz")}, {"channels_background": 9}, {"max_pixels": 10**6})
    assert len({FolderSource(tmp_path, **some).fingerprint for some in options}) == len(options)


def test_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(6 * 2**30)
    assert FolderSource(tmp_path).read(["a.jpg"])[0].reason.startswith(f"it has {6 * 2**30:,} bytes")


def test_an_image_without_memory_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    source = FolderSource(tmp_path)
    read = source.read_bytes
    monkeypatch.setattr(source, "read_bytes", lambda position: bytearray(2**62) if position == 0 else read(position))
    first, second = source.read(source.ids)
    assert first == Reject("a.png", "it needs more memory than there is")
    assert second[0, 0, 0] == 2


def test_every_kind_of_archive_decodes_large_jpegs_at_a_reduced_scale(opened: Callable[..., Any]) -> None:
    buffer = io.BytesIO()
    PillowImage.fromarray(np.zeros((640, 800, 3), np.uint8)).save(buffer, "JPEG")
    source = opened({"a.jpg": buffer.getvalue()})
    assert [source.read_for(source.ids, size)[0].shape[:2] for size in (321, 160, 80, 40)] == [
        (640, 800),
        (320, 400),
        (160, 200),
        (80, 100),
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_large_jpegs_are_decoded_at_a_reduced_scale_everywhere(tmp_path: Path, turned: bool) -> None:
    """Features, training and scoring see the same pixels, which a full decoding hardly changes."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    picture = PillowImage.fromarray(cv2.resize(coarse, (400, 320), interpolation=cv2.INTER_CUBIC))
    exif = PillowImage.Exif()
    exif[0x0112] = 6 if turned else 1
    for name in ("a.jpg", "b.jpg"):
        picture.save(tmp_path / name, quality=92, exif=exif)
    source = FolderSource(tmp_path)
    reduced = source.read_for(["a.jpg"], 32)[0]
    assert reduced.shape == ((100, 80, 3) if turned else (80, 100, 3))
    assert source.read(["a.jpg"])[0].shape[:2] == ((400, 320) if turned else (320, 400))
    expected = resize(reduced, 32, "stretch")
    assert np.abs(expected.astype(int) - resize(source.read(["a.jpg"])[0], 32, "stretch")).max() <= 4
    batch = next(stream(source, ["a.jpg"], size=32, batch_size=1))
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), expected)
    np.testing.assert_array_equal(next_readable(source, ["a.jpg"], 0, 32)[0], reduced)
    packed = ParquetSource(convert(source, tmp_path / "packed", size=32, encoding="png")).read(["a.jpg"])[0]
    assert min(packed.shape[:2]) == 32
    np.testing.assert_array_equal(packed, scale(reduced, *packed.shape[:2]))
    stretched = FolderSource(tmp_path, rendering=Rendering(curve="sqrt"))
    assert stretched.read_for(["a.jpg"], 32)[0].shape == source.read(["a.jpg"])[0].shape
