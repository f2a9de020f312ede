import io
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from pictures import png, wcs
from PIL import Image as PillowImage

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources.catalogue import CatalogueSource
from anomalymatch.data.sources.fits import FitsSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.data.sources.zarr import ZarrSource
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.ui import originals, pictures
from anomalymatch.ui.pictures import EIGHT_BIT_STRETCHES, STRETCHES, Pictures, ThumbnailCache, fitted, step

RNG = np.random.default_rng(0)


def opened(data: bytes) -> np.ndarray:
    return np.asarray(PillowImage.open(io.BytesIO(data)))


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels).save(path)
    return path


def field(size: int = 80) -> np.ndarray:
    """Make an image of a bright star and a faint galaxy on a noisy sky."""
    y, x = np.mgrid[:size, :size].astype(float)
    image = np.random.default_rng(1).normal(100, 3, (size, size)) + 25 * np.exp(-np.hypot(x - 25, y - 30) / 8)
    return (image + 6e4 * (1 + ((x - 60) ** 2 + (y - 60) ** 2) / 3) ** -2.5).astype(np.float32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    save(root / "wide.png", RNG.integers(0, 256, (30, 90, 3), dtype=np.uint8))
    save(root / "sub/small.png", np.full((8, 8, 3), (10, 100, 200), np.uint8))
    (root / "broken.png").write_bytes((root / "wide.png").read_bytes()[:500])
    return root


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made = []

    def pictures_of(source: Any, workers: int = 2) -> Pictures:
        made.append(Pictures(source, tmp_path / "cache", workers=workers))
        return made[-1]

    yield pictures_of
    for one in made:
        one.close()


# Thumbnails


def test_sides_are_rounded_up() -> None:
    assert [step(side) for side in (-5, 1, 64, 65, 128, 200, 512, 10**9)] == [64, 64, 64, 96, 128, 256, 512, 512]


def test_large_images_are_averaged_over_areas() -> None:
    board = np.indices((128, 128)).sum(axis=0) % 2 * 255
    assert np.unique(fitted(board.astype(np.uint8)[..., None], 64)).tolist() == [128]
    star = np.zeros((512, 512, 3), np.uint8)
    star[301, 203] = 255
    small = fitted(star, 64)
    assert small[37, 25].tolist() == [4, 4, 4]  # 255 / 8 / 8
    assert small.sum() == 12


def test_small_images_are_enlarged_smoothly() -> None:
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 8, axis=0)
    large = fitted(ramp, 64)
    assert large.shape == (32, 64, 3)
    assert len(np.unique(large)) > 50
    assert (np.diff(large[16, :, 0].astype(int)) >= 0).all()
    assert fitted(np.zeros((1, 5000, 1), np.uint8), 64).shape == (1, 64, 3)
    assert fitted(np.zeros((64, 10, 5), np.uint8), 64).shape == (64, 10, 3)


def test_thumbnails_of_a_folder(photos: Path, make: Any) -> None:
    one = make(FolderSource(photos))
    wide = opened(one.thumbnail("wide.png", 100))
    assert wide.shape == (43, 128, 3)
    colour = opened(one.thumbnail("sub/small.png", 64))
    assert colour.shape == (64, 64, 3)
    assert np.abs(colour.astype(int) - (10, 100, 200)).max() <= 3
    with pytest.raises(UnreadableImageError, match="truncated"):
        one.thumbnail("broken.png", 64)
    for unknown in ("nothing.png", "../photos/wide.png", "/etc/passwd", ""):
        for call in (one.full, one.metadata, one.coordinates, one.original, lambda i: one.thumbnail(i, 64)):
            with pytest.raises(DataError, match=r"photos"):
                call(unknown)


def test_thumbnails_of_large_jpegs_are_decoded_at_a_reduced_scale(tmp_path: Path, make: Any, monkeypatch: Any) -> None:
    coarse = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    whole = cv2.resize(coarse, (800, 600), interpolation=cv2.INTER_CUBIC)
    save(tmp_path / "in" / "a.jpg", whole)
    source = FolderSource(tmp_path / "in")
    decoded, decode = [], source.decode
    monkeypatch.setattr(source, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    small = opened(make(source).thumbnail("a.jpg", 64))
    assert decoded[-1].shape == (150, 200, 3)
    assert small.shape == (48, 64, 3)
    assert np.abs(small.astype(int) - fitted(whole, 64)).mean() < 3
    make(source).thumbnail("a.jpg", 64, stretch="sqrt")
    assert decoded[-1].shape == (600, 800, 3), "another stretch depends on all pixels"


def test_thumbnails_are_cached(make: Any, make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    one = make(source)
    first = one.thumbnail("im000003", 128)
    assert one.thumbnail("im000003", 100) == first
    assert source.reads == 1
    assert make(source).thumbnail("im000003", 128) == first
    assert source.reads == 1, "from the disk"
    assert one.thumbnail("im000003", 129) != first
    assert one.thumbnail("im000004", 128) != first
    assert make(make_source(fingerprint="changed")).thumbnail("im000003", 128) == first
    assert source.reads == 3
    stretched = make(make_source(rendering=Rendering("minmax", "log")))
    assert stretched.thumbnail("im000003", 128) != first


def test_thumbnails_of_each_stretch_and_channel_are_cached(make: Any, make_source: Any) -> None:
    source = make_source()
    one = make(source)
    looks = [{}, {"stretch": "sqrt"}, {"channel": "green"}, {"stretch": "sqrt", "channel": "green"}]
    found = [one.thumbnail("im000003", 128, **look) for look in looks]
    assert len(set(found)) == 4
    assert source.reads == 4
    assert [make(source).thumbnail("im000003", 128, **look) for look in looks] == found
    assert source.reads == 4, "from the disk"
    red, green, blue = np.moveaxis(opened(found[2]).astype(int), 2, 0)
    assert max(np.abs(red - green).max(), np.abs(blue - green).max()) <= 1, "one channel is grey"
    for wrong in ({"stretch": "cubic"}, {"channel": "u"}):
        with pytest.raises(ConfigError):
            one.thumbnail("im000003", 128, **wrong)


def test_stretches_suit_the_type_of_the_images(tmp_path: Path, make: Any, make_source: Any) -> None:
    assert make(make_source()).stretches == ("as trained", "sqrt", "asinh")
    limited = make_source(rendering=Rendering(limits={"red": (0, 9)}))
    assert make(limited).stretches == EIGHT_BIT_STRETCHES, "linear differs from the training"
    deep = make_source()
    deep.load = lambda position: np.full((4, 4, 3), position, np.uint16)
    assert make(deep).stretches == STRETCHES
    (tmp_path / "mixed").mkdir()
    for name, dtype in (("a", np.uint8), ("b", np.uint8), ("c", np.float32)):
        fits.PrimaryHDU(field(9).astype(dtype)).writeto(tmp_path / f"mixed/{name}.fits")
    assert make(FitsSource(tmp_path / "mixed")).stretches == STRETCHES


def test_thumbnails_from_many_threads(make: Any, make_source: Any, count_calls: Any) -> None:
    source = make_source(30)
    source.load = count_calls(source.load)
    one = make(source, workers=2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda id_: one.thumbnail(id_, 64), list(source.ids) * 2))
    assert source.load.most == 2
    assert found[:30] == found[30:]
    assert len(set(found)) == 30


# The cache


def key(number: int) -> tuple[str, str, int]:
    return ("source", f"image {number}", 64)


def test_thumbnail_cache_is_bounded(tmp_path: Path) -> None:
    cache = ThumbnailCache(tmp_path / "t.sqlite", memory_bytes=25_000, disk_bytes=300_000)
    for number in range(100):
        cache.put(key(number), bytes([number]) * 10_000)
    assert len(cache._memory) == 2
    held = [number for number in range(100) if cache.get(key(number)) is not None]
    assert 15 < len(held) < 35
    assert held[-5:] == [95, 96, 97, 98, 99], "the oldest go first"
    assert all(cache.get(key(number)) == bytes([number]) * 10_000 for number in held)
    cache.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600_000


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000, None])
def test_a_damaged_cache_is_replaced(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.sqlite"
    if content is None:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE thumbnails (something TEXT)")
        connection.close()
    else:
        path.write_bytes(content)
    cache = ThumbnailCache(path)
    cache.put(key(1), b"abc")
    cache._memory = LRU(2**20, cost=len)
    assert cache.get(key(1)) == b"abc"
    cache.close()


@pytest.mark.parametrize("breaks", [True, False], ids=["that breaks", "without a file"])
def test_thumbnails_of_an_unusable_cache_stay_in_memory(tmp_path: Path, caplog: Any, breaks: bool) -> None:
    (tmp_path / "file").write_text("")
    cache = ThumbnailCache(tmp_path / ("t.sqlite" if breaks else "file/t.sqlite"))
    if breaks:
        cache._connection.execute("DROP TABLE thumbnails")
    cache.put(key(1), b"abc")
    assert "stored" in caplog.text
    assert cache.get(key(1)) == b"abc"
    assert cache.get(key(2)) is None


def test_two_caches_share_a_file(tmp_path: Path) -> None:
    caches = [ThumbnailCache(tmp_path / "t.sqlite") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: caches[n % 2].put(key(n), b"%d" % n), range(200)))
    for cache in caches:
        cache._memory = LRU(2**20, cost=len)
        assert [cache.get(key(n)) for n in range(200)] == [b"%d" % n for n in range(200)]
        cache.close()


# The large view


def test_full_resolution_is_lossless(photos: Path, make: Any) -> None:
    one = make(FolderSource(photos))
    pixels = opened((photos / "wide.png").read_bytes())
    assert np.array_equal(opened(one.full("wide.png")), pixels)
    assert np.array_equal(opened(one.full("wide.png", stretch="linear")), pixels)
    assert np.array_equal(opened(one.full("wide.png", channel="green")), np.repeat(pixels[..., 1:2], 3, axis=2))
    assert one.metadata("wide.png")["size"] == "90 x 30 pixels"
    assert tuple(one.channels) == ("red", "green", "blue")


def test_every_stretch_differs(tmp_path: Path, make: Any) -> None:
    (tmp_path / "fits").mkdir()
    fits.PrimaryHDU(field(160)).writeto(tmp_path / "fits/a.fits")
    one = make(FitsSource(tmp_path / "fits", rendering=Rendering("minmax")))
    shown = {stretch: opened(one.full("a.fits", stretch=stretch))[..., 0].astype(float) for stretch in STRETCHES}
    assert len({image.tobytes() for image in shown.values()}) == len(STRETCHES)
    galaxy, sky = (slice(28, 33), slice(23, 28)), (slice(100, 160), slice(0, 60))
    for stretch, image in shown.items():
        assert image.shape == (160, 160)
        assert image[60, 60] == 255
        contrast = np.median(image[galaxy]) - np.median(image[sky])
        assert contrast < 3 if stretch == "as trained" else contrast > 15, stretch
    assert np.array_equal(one.source.read(["a.fits"])[0][..., 0], shown["as trained"])


@pytest.mark.parametrize("stretch", STRETCHES)
def test_stretches_of_eight_bits(stretch: str, make: Any, make_source: Any) -> None:
    one = make(make_source())
    image, plain = opened(one.full("im000001", stretch=stretch)), opened(one.full("im000001"))
    assert np.array_equal(image, plain) == (stretch in ("as trained", "linear"))


def test_bands_and_combined_channels(make: Any, make_source: Any) -> None:
    combine = {"red": {"i": 1}, "g": {"r": 1, "i": 1}}
    source = make_source(channels=3, bands=("g", "r", "i"), rendering=Rendering("minmax", combine=combine))
    source.load = lambda position: np.random.default_rng(position).normal(0, 1, (9, 9, 3))
    one = make(source)
    assert tuple(one.channels) == ("red", "g", "r", "i")
    trained = source.read(["im000000"])[0]
    assert np.array_equal(opened(one.full("im000000", channel="g"))[..., 0], trained[..., 1])
    pixels = source.pixels("im000000")
    band = Rendering("minmax")(pixels[..., 1:2], ("r",))
    assert np.array_equal(opened(one.full("im000000", channel="r"))[..., :1], band)
    assert np.array_equal(opened(one.full("im000000"))[..., 2], trained[..., 1]), "two channels as a false colour"
    limited = make(make_source(rendering=Rendering(limits={"red": (0, 1), "green": (0, 1), "blue": (0, 1)})))
    assert np.median(opened(limited.full("im000001"))) == 255
    assert np.median(opened(limited.full("im000001", stretch="linear"))) < 100, "limits apply as trained only"
    with pytest.raises(ConfigError, match="'u'"):
        one.full("im000000", channel="u")
    with pytest.raises(ConfigError, match="'cubic'"):
        one.full("im000000", stretch="cubic")


def test_an_image_is_read_once_for_all_stretches(make: Any, make_source: Any) -> None:
    source = make_source()
    one = make(source)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda stretch: one.full("im000001", stretch=stretch), STRETCHES))
    assert one.metadata("im000001")["size"] == "32 x 32 pixels"
    assert source.reads == 1
    one._decoded.limit = 32 * 32 * 3
    one.metadata("im000002")
    one.metadata("im000001")
    assert source.reads == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_very_large_images_are_reduced(make: Any, make_source: Any, monkeypatch: Any, dtype: Any) -> None:
    source = make_source(channels=1)
    source.load = lambda position: (np.indices((60, 41)).sum(axis=0)[..., None] % 2 * 200).astype(dtype)
    one = make(source)
    assert opened(one.full("im000000")).shape == (60, 41, 3)
    monkeypatch.setattr(pictures, "MAX_VALUES", 1000)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    assert opened(one.full("im000000")).shape == (30, 20, 3)
    assert one.metadata("im000000")["size"] == "41 x 60 pixels"
    assert opened(one.thumbnail("im000000", 64)).shape == (64, 43, 3)


# Files that changed after the archive was opened


def test_a_link_that_leaves_the_folder_is_not_followed(photos: Path, make: Any, tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.png", np.full((9, 9, 3), 7, np.uint8))
    one = make(FolderSource(photos))
    (photos / "wide.png").unlink()
    (photos / "wide.png").symlink_to(secret)
    for call in (one.full, one.original, lambda id_: one.thumbnail(id_, 64)):
        with pytest.raises(UnreadableImageError, match="it has become a link that leaves the folder of the archive"):
            call("wide.png")
    found = one.metadata("wide.png")
    assert "leaves the folder" in found["unreadable"]
    assert str(secret) not in str(found)
    (photos / "wide.png").unlink()
    (photos / "wide.png").symlink_to(photos / "sub/small.png")
    assert one.metadata("wide.png")["size"] == "8 x 8 pixels", "a link within the folder is fine"


def test_a_folder_that_becomes_a_link_while_its_file_is_read(photos: Path, make: Any, tmp_path: Path) -> None:
    source = FolderSource(photos)
    load = source.load

    def swap(position: int) -> np.ndarray:
        (photos / "sub").rename(tmp_path / "elsewhere")
        (photos / "sub").symlink_to(tmp_path / "elsewhere")
        return load(position)

    source.load = swap
    with pytest.raises(UnreadableImageError, match="leaves the folder"):
        make(source).full("sub/small.png")


def test_only_regular_files_are_opened(photos: Path, make: Any, monkeypatch: Any) -> None:
    one = make(FolderSource(photos))
    (photos / "wide.png").unlink()
    with pytest.raises(UnreadableImageError, match="cannot be opened: No such file or directory"):
        one.full("wide.png")
    os.mkfifo(photos / "wide.png")  # reading it would wait forever
    with pytest.raises(UnreadableImageError, match="it is no longer a file"):
        one.full("wide.png")
    monkeypatch.setattr(originals, "MAX_BYTES", 10)
    with pytest.raises(UnreadableImageError, match=r"it has \d+ bytes, which is more than 10"):
        one.thumbnail("sub/small.png", 64)


def test_links_in_fits_archives(tmp_path: Path, make: Any) -> None:
    root = tmp_path / "fits"
    root.mkdir()
    for path in (root / "a.fits", tmp_path / "secret.fits"):
        fits.PrimaryHDU(field(20)).writeto(path)
    one = make(FitsSource(root))
    (root / "a.fits").unlink()
    (root / "a.fits").symlink_to(tmp_path / "secret.fits")
    for call in (one.full, one.original):
        with pytest.raises(UnreadableImageError, match="leaves the folder"):
            call("a.fits")
    assert one.coordinates("a.fits") is None
    assert set(one.metadata("a.fits")) == {"unreadable"}


# Metadata


def test_metadata_of_fits(tmp_path: Path, make: Any) -> None:
    header = wcs(150.0, 2.0, shape=(20, 20)).to_header()
    header["TELESCOP"], header["BUNIT"], header["OBJECT"] = "HST", "nJy", "<b>x</b>"
    main = fits.PrimaryHDU(header=fits.Header({"OBSERVER": "me", "OBJECT": "field 1"}))
    (tmp_path / "f").mkdir()
    fits.HDUList([main, fits.ImageHDU(field(20), header, name="SCI")]).writeto(tmp_path / "f/a.fits")
    one = make(FitsSource(tmp_path / "f"))
    found = one.metadata("a.fits")
    assert found["size"] == "20 x 20 pixels"
    assert found["values"].startswith("float32, 9") or found["values"].startswith("float32, 8")
    assert found["values"].endswith(" nJy in grey")
    wanted = {"TELESCOP": "HST", "OBSERVER": "me", "OBJECT": "field 1", "OBJECT (SCI)": "<b>x</b>"}
    assert wanted.items() <= found.items()
    assert not {"SIMPLE", "NAXIS1", "EXTEND"} & set(found)
    assert found["bytes"] == f"{(tmp_path / 'f/a.fits').stat().st_size:,}"
    assert found["changed"].endswith("UTC")
    assert one.coordinates("a.fits") == pytest.approx((150.0, 2.0))


def test_long_headers_are_cut(tmp_path: Path, make: Any) -> None:
    header = fits.Header({f"K{i}": i for i in range(900)})
    header["LONG"] = "x" * 60
    (tmp_path / "f").mkdir()
    fits.PrimaryHDU(field(9), header).writeto(tmp_path / "f/a.fits")
    assert 390 < len(make(FitsSource(tmp_path / "f")).metadata("a.fits")) < 420


def test_metadata_of_a_catalogue(tmp_path: Path, make: Any) -> None:
    np.save(tmp_path / "t.npy", field(40))
    rows = "id,ra,dec,x,y,tile,survey,mag\na,10.5,-3,20,20,t.npy,deep,21.5\nb,,,10,10,t.npy,,9\n"
    (tmp_path / "cat.csv").write_text(rows)
    source = CatalogueSource(tmp_path / "cat.csv", x_column="x", y_column="y", size=8)
    one = make(source)
    table = source.metadata()
    assert table is not None
    assert table.column_names == ["id", "ra", "dec", "x", "y", "tile", "survey", "mag"]
    assert {"survey": "deep", "mag": "21.5", "size": "8 x 8 pixels"}.items() <= one.metadata("a").items()
    assert "survey" not in one.metadata("b")
    assert one.coordinates("a") == (10.5, -3.0)
    assert one.coordinates("b") is None


def test_catalogues_of_other_kinds(tmp_path: Path) -> None:
    from astropy.table import Table

    np.save(tmp_path / "t.npy", field(40))
    columns = {"id": ["a", "b"], "x": [9, 9], "y": [9, 9], "tile": ["t.npy"] * 2, "n": [10**17 + 1, 2]}
    Table(columns | {"flux": np.ones((2, 5))}).write(tmp_path / "cat.fits")
    listed = {name: pa.array(values) for name, values in columns.items()} | {"flux": pa.array([[1.0], [2.0]])}
    pq.write_table(pa.table(listed), tmp_path / "cat.parquet")
    for name in ("cat.fits", "cat.parquet"):
        table = CatalogueSource(tmp_path / name, x_column="x", y_column="y").metadata()
        assert table is not None
        assert table.column_names == list(columns), "columns of lists are passed over"
        assert table["n"].to_pylist() == ["100000000000000001", "2"]


def test_metadata_of_parquet(tmp_path: Path, make: Any) -> None:
    (tmp_path / "p").mkdir()
    for name, first in (("a", 0), ("b", 3)):
        rows = range(first, first + 3)
        columns: dict[str, Any] = {"image": [png(i) for i in rows], "label": ["x"] * 3, "key": list(rows)}
        extra = {"RA": [10.0 * i for i in rows], "Dec": [i - 1.5 for i in rows]} if name == "b" else {}
        other = {"vector": [[1, 2]] * 3, "mask": [b"\0"] * 3}
        pq.write_table(pa.table(columns | extra | other), tmp_path / f"p/{name}.parquet", row_group_size=2)
    source = ParquetSource(tmp_path / "p", id_column="key")
    one = make(source)
    table = source.metadata()
    assert table is not None
    assert table.to_pydict() == {
        "key": ["0", "1", "2", "3", "4", "5"],
        "RA": [None, None, None, "30", "40", "50"],
        "Dec": [None, None, None, "1.5", "2.5", "3.5"],
    }
    assert one.coordinates("4") == (40.0, 2.5)
    assert one.coordinates("1") is None
    assert {"RA": "40", "class": "x", "format": "PNG"}.items() <= one.metadata("4").items()
    assert one.original("4") == (png(4), ".png")
    with pytest.raises(DataError):
        one.coordinates("../4")


def test_metadata_of_zarr(tmp_path: Path, make: Any) -> None:
    zarr = pytest.importorskip("zarr")
    (tmp_path / "z").mkdir()
    for name in "ab":
        group = zarr.open_group(tmp_path / f"z/{name}.zarr", mode="w")
        group.create_array("images", data=RNG.integers(1, 255, (2, 8, 8, 3), dtype=np.uint8))
    pq.write_table(pa.table({"filename": ["u", "v"], "z": [0.1, 0.2]}), tmp_path / "z/b_metadata.parquet")
    source = ZarrSource(tmp_path / "z")
    assert list(source.ids) == ["a/000000", "a/000001", "u", "v"]
    table = source.metadata()
    assert table is not None
    assert table.to_pydict() == {"filename": [None, None, "u", "v"], "z": [None, None, "0.1", "0.2"]}
    one = make(source)
    assert one.metadata("v")["z"] == "0.2"
    assert "z" not in one.metadata("a/000000")
    assert one.original("v")[1] == ".png"
    pq.write_table(pa.table({"filename": ["u"], "z": [0.1]}), tmp_path / "z/b_metadata.parquet")
    with pytest.raises(DataError, match=r"b_metadata.parquet: expected 2 rows, one for each image, found 1"):
        source.metadata()


def test_large_columns_are_ignored(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    from anomalymatch.data.sources import tables as _beside

    columns = {"image": [png(1)], "short": ["a"], "long": ["b" * 5000], "other": ["c"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    monkeypatch.setattr(_beside, "MAX_BYTES", 1000)
    table = ParquetSource(tmp_path).metadata()
    assert table is not None
    assert table.column_names == ["short", "other"]
    assert "the column long is too large" in caplog.text


def test_no_metadata(photos: Path, make: Any, make_source: Any) -> None:
    assert make_source().metadata() is None
    assert FolderSource(photos).metadata() is None
    one = make(FolderSource(photos))
    found = one.metadata("wide.png")
    assert found["size"] == "90 x 30 pixels"
    assert found["format"] == "PNG"
    assert one.coordinates("wide.png") is None
    assert one.metadata("broken.png")["unreadable"].startswith("cannot be decoded")


def test_metadata_is_one_short_line(tmp_path: Path, make: Any) -> None:
    pq.write_table(pa.table({"image": [png(1)], "note": ["a\n\x1b[1m" + "b" * 500]}), tmp_path / "a.parquet")
    text = make(ParquetSource(tmp_path)).metadata("a/0000000")["note"]
    assert len(text) == 300
    assert text.startswith("a  [1mb")
    assert text.endswith("…")


@pytest.mark.parametrize(
    ("kind", "suffix"), [("JPEG", ".jpg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif")]
)
def test_suffixes_follow_the_bytes(tmp_path: Path, make: Any, kind: str, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a/wrong.png").open("wb") as file:
        PillowImage.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, kind)
    one = make(FolderSource(tmp_path / "a"))
    assert one.original("wrong.png") == ((tmp_path / "a/wrong.png").read_bytes(), suffix)
    assert originals.suffix_of(b"what is this") == ".bin"
