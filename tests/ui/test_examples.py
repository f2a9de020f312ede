import io
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image as PillowImage

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources.fits import FitsSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import DataError
from anomalymatch.ui import examples
from anomalymatch.ui.examples import Examples

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: np.ndarray) -> np.ndarray:
    return np.array([image[..., 0].mean(), image.std(), image.shape[2]], np.float32)


def file(pixels: np.ndarray = PIXELS, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def fits_file(*units: np.ndarray, compressed: bool = False) -> bytes:
    made = [fits.CompImageHDU(unit) if compressed else fits.ImageHDU(unit) for unit in units]
    hdus = [fits.PrimaryHDU(), *made] if compressed or len(units) > 1 else [fits.PrimaryHDU(units[0])]
    buffer = io.BytesIO()
    fits.HDUList(hdus).writeto(buffer)
    return buffer.getvalue()


@pytest.fixture
def make(tmp_path: Path, make_source: Any) -> Any:
    def make(source=None):
        examples = Examples(tmp_path / "examples", encode, source or make_source())
        examples.restore()
        return examples

    return make


def test_examples_are_stored(make: Any, tmp_path: Path) -> None:
    some = make()
    assert len(some.features()) == 0
    first = some.add("merger.png", file())
    assert first.features.tolist() == encode(PIXELS).tolist()
    assert first.name == "merger.png"
    second = some.add("b.jpg", file(PIXELS[:8], "JPEG"))
    assert some.add("b.bmp", file(kind="BMP")) is first  # the same image
    assert [example.id for example in some.all()] == [first.id, second.id]
    assert some.features().shape == (2, 3)
    shown = PillowImage.open(io.BytesIO(some.thumbnail(first.id, 60)))
    assert shown.size == (64, 38)
    stored = sorted((tmp_path / "examples").iterdir())
    assert {path.name for path in stored} == {f"{first.id}.png", f"{second.id}.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in stored)


def test_examples_survive_a_restart(make: Any, tmp_path: Path) -> None:
    some = make()
    ids = [some.add(f"bild {n} ü.png", file(PIXELS + np.uint8(n))).id for n in range(3)]
    for number, id_ in enumerate(ids):
        os.utime(tmp_path / "examples" / f"{id_}.png", (number, number))
    some.remove(ids[1])
    again = make()
    assert [example.id for example in again.all()] == [ids[0], ids[2]]
    assert [example.name for example in again.all()] == ["bild 0 ü.png", "bild 2 ü.png"]
    assert np.array_equal(again.features(), some.features())
    assert again.thumbnail(ids[0], 64) == some.thumbnail(ids[0], 64)
    assert again.add("x", file()).id == ids[0]


def test_removed_and_unknown_examples(make: Any) -> None:
    some = make()
    id_ = some.add("a.png", file()).id
    some.remove(id_)
    for call in (some.remove, lambda id_: some.thumbnail(id_, 64)):
        for unknown in (id_, "../../etc/passwd", ""):
            with pytest.raises(DataError, match="there is no example"):
                call(unknown)
    assert some.all() == []


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/cron.d/x.png", "..\\..\\x.png", "a\0b/x.png", "x" * 5000, "", "..", "\n\x1b[2J.png"]
)
def test_the_path_does_not_depend_on_the_name(make: Any, tmp_path: Path, name: str) -> None:
    some = make()
    example = some.add(name, file())
    assert [path.name for path in (tmp_path / "examples").iterdir()] == [f"{example.id}.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"examples"}
    assert "/" not in example.name
    assert 0 < len(example.name) <= examples.MAX_NAME
    assert example.name.isprintable()
    assert make().all()[0].name == example.name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^a.png cannot be an example: it is empty \(0 bytes\)$"),
        (b"hello" * 100, r"it is not an image in one of the formats JPEG, PNG, .*, FITS$"),
        (file()[:300], r"cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"it is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", r"it is not an image"),
        ((9000, 9000), r"9000 x 9000 pixels is more than 67,108,864$"),
        ((60000, 60000), r"67,108,864 pixels"),
        ((2**31 - 1, 2**31 - 1), r"67,108,864 pixels"),
        (b"SIMPLE  =" + b"x" * 5000, r"cannot be read as FITS|no image|damaged"),
        (fits_file(PIXELS[..., 0], compressed=True), r"it is a compressed FITS file: unpack it by funpack$"),
    ],
)
def test_refused_files(make: Any, tmp_path: Path, png_claiming: Any, data: Any, message: str) -> None:
    some = make()
    with pytest.raises(DataError, match=message):
        some.add("a.png", png_claiming(*data) if isinstance(data, tuple) else data)
    assert list((tmp_path / "examples").iterdir()) == []
    assert some.all() == []


def test_limits(make: Any, monkeypatch: Any) -> None:
    some = make()
    monkeypatch.setattr(examples, "MAX_EXAMPLES", 1)
    some.add("a.png", file())
    with pytest.raises(DataError, match=r"there are 1 examples.*b.png"):
        some.add("b.png", file(PIXELS[:5]))
    monkeypatch.setattr(examples, "MAX_PIXELS", 255)
    with pytest.raises(DataError, match="16 x 16 pixels is more than 255"):
        some.add("a.fits", fits_file(np.zeros((16, 16), np.float32)))
    monkeypatch.setattr(examples, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"b.png .* bytes, which is more than 100$"):
        some.add("b.png", file(PIXELS[:5]))


def test_large_images_are_reduced(make: Any) -> None:
    large = np.zeros((700, 3000, 3), np.uint8)
    large[:, :1500] = 240
    some = make()
    example = some.add("a.png", file(large))
    assert example.features[0] == pytest.approx(120, abs=1)
    assert some._images[example.id].shape == (239, 1024, 3)
    assert np.array_equal(make()._images[example.id], some._images[example.id])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_get_the_channels_of_the_archive(make: Any, make_source: Any, channels: int) -> None:
    some = make(make_source(channels=channels))
    for kind, pixels in (("RGB", PIXELS), ("L", PIXELS[..., 0])):
        assert some.add(kind, file(pixels)).features[2] == channels
    assert len(make(make_source(channels=channels)).all()) == 2


def test_pictures_are_rendered_like_the_archive(make: Any, make_source: Any) -> None:
    rendering = Rendering(curve="sqrt")
    some = make(make_source(rendering=rendering))
    assert some.add("a", file()).features.tolist() == encode(rendering(PIXELS, ("red", "green", "blue"))).tolist()


def test_examples_of_a_fits_archive(tmp_path: Path, make: Any) -> None:
    (tmp_path / "f").mkdir()
    plane = RNG.normal(5, 1, (16, 16)).astype(np.float32)
    (tmp_path / "f/a.fits").write_bytes(fits_file(plane))
    rendering = Rendering("percentile", "asinh")
    some = make(FitsSource(tmp_path / "f", rendering=rendering))
    example = some.add("b.fits", fits_file(plane + 1))
    assert example.features.tolist() == encode(rendering((plane + 1)[..., None], ("grey",))).tolist()
    grey = np.repeat(PIXELS[..., :1], 3, axis=2)
    assert some.add("screenshot.png", file(grey)).features.tolist() == encode(grey[..., :1]).tolist()
    deep = (PIXELS[..., 0].astype(np.uint16)) * 200
    assert some.add("deep.png", file(deep)).features.tolist() == encode(rendering(deep[..., None], ("grey",))).tolist()
    with pytest.raises(DataError, match=r"^c.fits cannot be an example: it has 2 bands instead of 1: grey$"):
        some.add("c.fits", fits_file(np.stack([plane, plane])))
    with pytest.raises(DataError, match=r"truncated"):
        some.add("c.fits", fits_file(plane)[:3000])
    assert not list((tmp_path / "examples").glob(".upload*"))
    assert len(make(FitsSource(tmp_path / "f", rendering=rendering)).all()) == 3


def test_archives_of_many_bands(tmp_path: Path, make: Any) -> None:
    (tmp_path / "f").mkdir()
    cube = RNG.normal(5, 1, (5, 16, 16)).astype(np.float32)
    (tmp_path / "f/a.fits").write_bytes(fits_file(cube))
    some = make(FitsSource(tmp_path / "f", rendering=Rendering("minmax")))
    assert some.add("b.fits", fits_file(cube)).features[2] == 5
    assert make(some.source)._images.keys() == some._images.keys()
    with pytest.raises(DataError, match=r"have the bands band0, .*, band4: drop a FITS file that has them"):
        some.add("a.png", file())
    combine = {name: {f"band{k}": 1} for k, name in enumerate(("red", "green", "blue"))}
    colour = make(FitsSource(tmp_path / "f", rendering=Rendering("minmax", combine=combine)))
    assert len(colour.all()) == 0, "an example of five channels no longer fits"
    assert colour.add("a.png", file()).features.tolist() == encode(PIXELS).tolist()


def test_examples_of_an_archive_of_tiff_bands(tmp_path: Path, make: Any) -> None:
    bands = RNG.integers(0, 4000, (2, 6, 8, 5), dtype=np.uint16)
    files = []
    for n, pixels in enumerate(bands):
        path = tmp_path / "archive" / f"{n}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
        files.append(path.read_bytes())
    source = FolderSource(tmp_path / "archive")
    some = make(source)
    assert some.add("x.tif", files[1]).features.tolist() == encode(source.read(source.ids)[1]).tolist()
    with pytest.raises(DataError, match="band0"):
        some.add("x.png", file())


def test_unsuitable_files_in_the_folder_are_ignored(make: Any, tmp_path: Path, caplog: Any, png_claiming: Any) -> None:
    some = make()
    kept = some.add("a.png", file())
    folder = tmp_path / "examples"
    (folder / "broken.png").write_bytes(file()[:200])
    (folder / "bomb.png").write_bytes(png_claiming(9000, 9000))
    (folder / "odd.png").write_bytes(file(np.zeros((4, 4), np.uint8)))
    (folder / "link.png").symlink_to(folder / f"{kept.id}.png")
    assert [example.id for example in make().all()] == [kept.id]
    for name in ("broken", "bomb", "odd", "link"):
        assert f"{name}.png is ignored" in caplog.text
        assert (folder / f"{name}.png").exists()


def test_an_encoder_that_fails_leaves_nothing(tmp_path: Path, make_source: Any) -> None:
    def fail(image: np.ndarray) -> np.ndarray:
        raise DataError("the network is gone")

    some = Examples(tmp_path / "examples", fail, make_source())
    assert len(some.features()) == 0
    with pytest.raises(DataError, match="the network is gone"):
        some.add("a.png", file())
    assert list((tmp_path / "examples").iterdir()) == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "FITS"])
def test_malicious_bytes_never_crash(make: Any, make_source: Any, kind: str) -> None:
    whole = fits_file(PIXELS[..., 0]) if kind == "FITS" else file(kind=kind)
    some, rng = make(make_source(channels=1)), np.random.default_rng(3)
    for number in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))] if number % 2 else whole)
        for at in rng.integers(0, min(len(data), 400), 4):
            data[at] ^= 1 << rng.integers(8)
        with suppress(DataError):
            some.add("a", bytes(data))
    assert len(make(make_source(channels=1)).all()) == len(some.all())


def test_threads(make: Any) -> None:
    some = make()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: some.add(str(n), file(PIXELS + np.uint8(n % 5))), range(40)))
    assert len(some.all()) == 5
