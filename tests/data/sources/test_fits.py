import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pictures import damaged, wcs

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources import fits_file
from anomalymatch.data.sources.fits import FitsImages, FitsSource
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Reject

PLANE = np.arange(20, dtype=np.float32).reshape(4, 5)
SCALED = Rendering(interval="minmax")


def write(path: Path, *units: Any, **cards: Any) -> Path:
    """Write one array as the primary image, or several units (arrays, or HDUs) behind an empty primary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(units) == 1 and isinstance(units[0], np.ndarray):
        fits.PrimaryHDU(units[0], fits.Header(cards)).writeto(path)
    else:
        made = [fits.ImageHDU(unit) if isinstance(unit, np.ndarray) else unit for unit in units]
        fits.HDUList([fits.PrimaryHDU(header=fits.Header(cards)), *made]).writeto(path)
    return path


def test_files_below_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "archive"
    for i, name in enumerate(["b.fits", "a.FIT", "sub/c.fits"]):
        write(root / name, PLANE + i)
    (root / "sub/d.fits.gz").write_bytes(gzip.compress((root / "b.fits").read_bytes()))
    write(root / "e.fits.fz", fits.CompImageHDU(PLANE.astype(np.int16)))
    write(root / ".hidden.fits", PLANE)
    (root / "notes.txt").write_text("no image")
    (root / "leaves.fits").symlink_to(write(tmp_path / "outside.fits", PLANE))
    source = FitsSource(root)
    assert source.ids == ["a.FIT", "b.fits", "e.fits.fz", "sub/c.fits", "sub/d.fits.gz"]
    assert (source.name, source.bands, source.units) == ("archive", ("grey",), None)
    assert "links that leave the folder: 1" in caplog.text
    assert source.pixels("a.FIT")[..., 0].tolist() == (PLANE + 1).tolist()
    assert source.pixels("sub/d.fits.gz")[..., 0].tolist() == PLANE.tolist()
    assert source.pixels("e.fits.fz")[..., 0].tolist() == PLANE.tolist()
    assert source.read(["b.fits"])[0][..., 0].tolist() == np.rint(PLANE / 19 * 255).astype(int).tolist()


def test_one_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.fits", PLANE, BUNIT="nJy")
    write(tmp_path / "b.fits", PLANE)
    (tmp_path / "labels.csv").write_text("filename,label\nnone.fits,normal\n")
    source = FitsSource(str(file))
    assert (source.ids, source.name, source.units) == (["a.fits"], "a.fits", "nJy")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_number_type_is_exact(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(dtype)
    limits = np.iinfo(kind) if kind.kind in "iu" else np.finfo(kind)
    values = np.array([[limits.min, 0, 1], [2, 3, limits.max]], dtype=kind)
    write(tmp_path / "a.fits", values)
    loaded = FitsSource(tmp_path).pixels("a.fits")
    assert loaded.dtype == kind
    assert loaded.dtype.isnative
    assert (loaded[..., 0] == values).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["u1", "i2", "i4", "i8", "f4", "f8"]),
    scale=st.sampled_from([1.0, 0.5, -2.0, 1e-3]),
    zero=st.sampled_from([0.0, 32768.0, 100.0, -128.0]),
    seed=st.integers(0, 99),
)
def test_scaling_matches_astropy(tmp_path: Path, dtype: str, scale: float, zero: float, seed: int) -> None:
    assume((dtype, scale, zero) != ("u1", 1.0, -128.0))  # signed bytes, at which astropy itself fails
    stored = np.random.default_rng(seed).integers(0, 100, (3, 4)).astype(dtype)
    path = tmp_path / "a.fits"
    path.unlink(missing_ok=True)
    write(path, stored)
    with fits.open(path, mode="update", do_not_scale_image_data=True) as file:
        file[0].header["BSCALE"], file[0].header["BZERO"] = scale, zero
    ours = FitsSource(tmp_path).pixels("a.fits")[..., 0]
    theirs = fits.getdata(path)
    assert ours.dtype == theirs.dtype.newbyteorder("=")
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("blank", "zero"), [(0, 0), (-7, 0), (-7, 32768)])
@pytest.mark.parametrize("compressed", [False, True])
def test_blank_becomes_nan(tmp_path: Path, blank: int, zero: int, compressed: bool) -> None:
    stored = np.array([[blank, 1], [2, 3]], dtype=np.int16)
    unit = fits.CompImageHDU(stored) if compressed else fits.ImageHDU(stored)
    write(tmp_path / "a.fits", unit)
    with fits.open(tmp_path / "a.fits", mode="update", disable_image_compression=True) as file:
        file[1].header["BLANK"] = blank
        file[1].header["BZERO"] = zero
    loaded = FitsSource(tmp_path).pixels("a.fits")[..., 0]
    assert loaded.dtype == np.float32
    assert np.isnan(loaded[0, 0])
    assert loaded.ravel()[1:].tolist() == [1 + zero, 2 + zero, 3 + zero]


def test_planes_of_a_cube_and_short_axes(tmp_path: Path) -> None:
    cube = np.stack([PLANE, PLANE + 100, PLANE + 200])
    write(tmp_path / "a.fits", cube)
    write(tmp_path / "b.fits", cube[None])
    write(tmp_path / "c.fits", fits.CompImageHDU(cube[None].astype(np.int32)))
    source = FitsSource(tmp_path)
    assert source.bands == ("red", "green", "blue")
    for id_ in source.ids:
        assert source.pixels(id_)[0, 0].tolist() == [0, 100, 200]
        assert source.pixels(id_).shape == (4, 5, 3)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("bands", [3, 5])
def test_cube_with_its_bands_last(
    tmp_path: Path, bands: int, compressed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cube = np.arange(40 * 52 * bands, dtype=np.int16).reshape(40, 52, bands)
    write(tmp_path / "in/a.fits", fits.CompImageHDU(cube) if compressed else cube)
    source = FitsSource(tmp_path / "in")
    assert source.pixels("a.fits").tolist() == cube.tolist()
    assert caplog.text.count("is read as (h, w, bands)") == 1
    assert FitsSource(tmp_path / "in", layout="hwc").pixels("a.fits").tolist() == cube.tolist()
    first = FitsSource(tmp_path / "in", layout="chw").pixels("a.fits")
    assert first.tolist() == np.moveaxis(cube, 0, 2).tolist()


def test_names_of_axes_decide_and_absurd_shapes_are_refused(tmp_path: Path) -> None:
    cube = np.zeros((40, 52, 10), dtype=np.uint8)
    assert FitsSource(write(tmp_path / "a.fits", cube, CTYPE3="FREQ")).load(0).shape == (52, 10, 40)
    named = write(tmp_path / "b.fits", cube, CTYPE2="RA---TAN", CTYPE3="DEC--TAN")
    assert FitsSource(named).load(0).shape == cube.shape
    with pytest.raises(DataError, match=r"\(40, 3, 52\) is neither .*layout to chw or hwc"):
        FitsSource(write(tmp_path / "c.fits", cube.reshape(-1)[: 40 * 3 * 52].reshape(40, 3, 52)))


def test_unsigned_integers_packed_by_plio(tmp_path: Path) -> None:
    """CFITSIO packs them without an offset, unlike astropy, which cannot write them."""
    values = np.arange(40 * 50, dtype=np.int32).reshape(40, 50) * 30
    write(tmp_path / "a.fits", fits.CompImageHDU(values, compression_type="PLIO_1"))
    with fits.open(tmp_path / "a.fits", mode="update", disable_image_compression=True) as file:
        file[1].header["ZBITPIX"], file[1].header["BZERO"], file[1].header["BSCALE"] = 16, 32768, 1
    loaded = FitsSource(tmp_path).pixels("a.fits")[..., 0]
    assert (loaded.dtype, loaded.tolist()) == (np.uint16, values.tolist())


def test_extensions(tmp_path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("x", "J", array=np.arange(3))])
    spectrum = fits.ImageHDU(np.arange(7.0), name="spectrum")
    units = [fits.ImageHDU(PLANE + 10 * i, name=name) for i, name in enumerate("GRI")]
    write(tmp_path / "a.fits", table, spectrum, *units)
    value = {
        None: [0],
        4: [10],
        "i": [20],
        (3, 5): [0, 20],
        ("i", "R"): [20, 10],
        -1: [20],
    }
    for extensions, expected in value.items():
        given = list(extensions) if isinstance(extensions, tuple) else extensions
        source = FitsSource(tmp_path, extensions=given)
        assert source.pixels("a.fits")[0, 0].tolist() == expected
    assert len({FitsSource(tmp_path, extensions=given).fingerprint for given in (None, 3, "g", [3, 4])}) == 4
    assert FitsSource(tmp_path, extensions=["i", "R"]).bands == ("I", "R")
    with pytest.raises(DataError, match=r"there is no extension z in it, only 0 PRIMARY, 1, 2 SPECTRUM, 3 G, 4 R, 5 I"):
        FitsSource(tmp_path, extensions="z")
    with pytest.raises(DataError, match="its extension spectrum is no image of 2 or 3 axes"):
        FitsSource(tmp_path, extensions="spectrum")
    with pytest.raises(ConfigError, match=r"extensions=\[\]: give null"):
        FitsSource(tmp_path, extensions=[])


def test_names_of_bands(tmp_path: Path) -> None:
    def bands(*units: Any, extensions: Any = None, **cards: Any) -> tuple[str, ...]:
        for old in tmp_path.glob("*.fits"):
            old.unlink()
        write(tmp_path / "a.fits", *units, **cards)
        return FitsSource(tmp_path, extensions=extensions).bands

    cube = np.stack([PLANE, PLANE])
    assert bands(PLANE, FILTER="F606W") == ("F606W",)
    assert bands(fits.ImageHDU(PLANE), FILTER="VIS") == ("VIS",)
    assert bands(cube, FILTER="g, r") == ("g", "r")
    assert bands(cube, FILTER="g") == ("band0", "band1")
    assert bands(cube, BANDS="gr") == ("g", "r")
    assert bands(cube, BANDS="VIS, NIR") == ("VIS", "NIR")
    assert bands(cube, BAND0="g", BAND1="z") == ("g", "z")
    assert bands(cube, FILTER1="g", FILTER2="i") == ("g", "i")
    assert bands(cube, CTYPE3="FREQ-LSR") == ("freq0", "freq1")
    assert bands(cube, CTYPE3="STOKES", CRVAL3=1.0, CRPIX3=1.0, CDELT3=1.0) == ("I", "Q")
    assert bands(cube, CTYPE3="STOKES", CRVAL3=4.0, CRPIX3=2.0, CDELT3=2.0) == ("Q", "V")
    assert bands(cube, CTYPE3="RGB") == ("band0", "band1")
    unnamed = [fits.ImageHDU(PLANE, fits.Header({"FILTER": name})) for name in "gr"]
    assert bands(*unnamed, extensions=[1, 2]) == ("g", "r")
    assert bands(PLANE, PLANE, extensions=[1, 2]) == ("band0", "band1")
    assert FitsSource(tmp_path, extensions=[1, 2], bands=["u", "v"]).bands == ("u", "v")
    with pytest.raises(ConfigError, match="expected 2 different names"):
        FitsSource(tmp_path, extensions=[1, 2], bands=["u"])


def test_files_with_other_bands_are_rejected(tmp_path: Path) -> None:
    g, r = (fits.ImageHDU(PLANE + i, name=name) for i, name in enumerate("GR"))
    write(tmp_path / "a.fits", g, r)
    write(tmp_path / "b.fits", r, g)
    write(tmp_path / "c.fits", PLANE, PLANE)
    write(tmp_path / "d.fits", g)
    write(tmp_path / "e.fits", g, np.stack([PLANE, PLANE]))
    write(tmp_path / "f.fits", g, PLANE[:2])
    by_index = FitsSource(tmp_path, extensions=[1, 2])
    reasons = [result.reason for result in by_index.read(by_index.ids) if isinstance(result, Reject)]
    assert reasons == [
        "its bands are R, G instead of G, R; give dataset.source.bands to take them as such",
        "its bands have no names in its headers instead of G, R; give dataset.source.bands to take them as such",
        "there is no extension 2 in it, only 0 PRIMARY, 1 G",
        "it has 3 bands instead of 2: G, R",
        "its extensions have different sizes: 5 x 2, 5 x 4",
    ]
    named = FitsSource(tmp_path, extensions=[1, 2], bands=["x", "y"])
    assert named.pixels("b.fits")[0, 0].tolist() == [1, 0]
    by_name = FitsSource(tmp_path, extensions=["g", "r"])
    assert by_name.pixels("b.fits")[0, 0].tolist() == [0, 1]


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    sound = write(tmp_path / "a.fits", np.stack([PLANE] * 100).reshape(100, 20), EXTEND=True).read_bytes()
    packed = write(tmp_path / "f.fits", fits.CompImageHDU(PLANE.repeat(40, 0))).read_bytes()
    (tmp_path / "b.fits").write_bytes(sound[:-2880])
    (tmp_path / "c.fits").write_bytes(b"")
    (tmp_path / "d.fits").write_text("no FITS")
    (tmp_path / "e.fits.gz").write_bytes(gzip.compress(sound)[:-30])
    (tmp_path / "f.fits").write_bytes(packed[:-2880])
    (tmp_path / "g.fits").write_bytes(sound[: 2880 + 8000])  # all pixels, without the padding
    (tmp_path / "h.fits").write_bytes(
        sound.replace(b"NAXIS2  =                  100", b"NAXIS2  =                   10")
    )
    write(tmp_path / "k.fits", np.zeros(5))
    source = FitsSource(tmp_path)
    reasons = {result.id: result.reason for result in source.read(source.ids) if isinstance(result, Reject)}
    assert re.search("its data are not as long as its header says|END", reasons.pop("h.fits"))
    assert reasons == {
        "b.fits": "the file is truncated: 2,240 of 8,000 bytes of data are missing",
        "c.fits": "the file is empty (0 bytes)",
        "d.fits": "it is no FITS file: it does not begin with SIMPLE",
        "e.fits.gz": "cannot be read as FITS: Compressed file ended before the end-of-stream marker was reached",
        "f.fits": "the file is truncated: 2,880 of 11,520 bytes of data are missing",
        "k.fits": "there is no image of 2 or 3 axes in it",
    }
    (tmp_path / "g.fits").unlink()
    assert source.read(["g.fits"]) == [Reject("g.fits", "cannot be opened: No such file or directory")]


def test_a_damaged_image_is_not_replaced_by_the_next(tmp_path: Path) -> None:
    write(tmp_path / "a.fits", PLANE, PLANE)
    sound = write(tmp_path / "b.fits", PLANE, PLANE + 1).read_bytes()
    (tmp_path / "b.fits").write_bytes(sound.replace(b"'IMAGE   '", b"'IMAGF   '", 1))
    result = FitsSource(tmp_path).read(["b.fits"])[0]
    assert isinstance(result, Reject)
    assert "its unit 1, which comes before any image, is damaged" in result.reason


@pytest.mark.parametrize("kind", ["plain", "RICE_1", "GZIP_2", "gz"])
def test_damaged_files_are_rejected_or_keep_their_shape(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    unit = fits.ImageHDU(noise) if kind in ("plain", "gz") else fits.CompImageHDU(noise, compression_type=kind)
    sound = write(tmp_path / "a.fits", unit).read_bytes()
    sound = gzip.compress(sound) if kind == "gz" else sound
    victim = tmp_path / "b.fits"
    victim.write_bytes(sound)
    source = FitsSource(tmp_path)
    for broken, is_cut in damaged(sound, 60):
        victim.write_bytes(broken)
        result = source.read(["b.fits"])[0]
        assert isinstance(result, Reject | np.ndarray)
        if is_cut and isinstance(result, np.ndarray):  # nothing but padding may be cut off
            assert np.array_equal(result, source.read(["a.fits"])[0])
            assert len(broken) >= 2 * 2880 + noise.nbytes


def test_a_large_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.fits", PLANE)
    monkeypatch.setattr("anomalymatch.data.sources.fits.MAX_PIXELS", 19)
    assert FitsSource(tmp_path).read(["a.fits"]) == [Reject("a.fits", "5 x 4 pixels is more than 19")]
    many = FitsSource(write(tmp_path / "many/c.fits", np.zeros((100, 2, 8), dtype=np.uint8)), layout="chw")
    assert many.read(["c.fits"]) == [Reject("c.fits", "8 x 2 x 100 pixels is more than 19")]
    (tmp_path / "b.fits.gz").write_bytes(gzip.compress((tmp_path / "a.fits").read_bytes()))
    monkeypatch.setattr(fits_file, "MAX_UNZIPPED", 1000)
    with pytest.raises(UnreadableImageError, match="unpacks to more than 1,000"):
        FitsImages(tmp_path / "b.fits.gz")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    sound = write(tmp_path / "a.fits", PLANE).read_bytes()
    (tmp_path / "b.fits.gz").write_bytes(gzip.compress(sound + bytes(2**27), 1))
    with pytest.raises(UnreadableImageError, match=r"but unpacks to more than [1-9]\d{2},"):
        FitsImages(tmp_path / "b.fits.gz")


def test_coordinates(tmp_path: Path) -> None:
    write(tmp_path / "a.fits", fits.ImageHDU(PLANE, wcs(350.0, -30.0, shape=(4, 5)).to_header()))
    write(tmp_path / "b.fits", fits.CompImageHDU(PLANE, wcs(0.0, 0.0, kind="GLON/GLAT", shape=(4, 5)).to_header()))
    write(tmp_path / "c.fits", np.stack([PLANE, PLANE]), RADECSYS="FK5", **dict(wcs(shape=(4, 5)).to_header().items()))
    write(tmp_path / "d.fits", PLANE)
    write(tmp_path / "e.fits", PLANE, CTYPE1="RA---ABC", CTYPE2="DEC--ABC")
    (tmp_path / "f.fits").write_bytes(b"")
    source = FitsSource(tmp_path)
    assert source.coordinates("a.fits") == pytest.approx((350.0, -30.0), abs=1e-9)
    assert source.coordinates("b.fits") == pytest.approx((266.40499, -28.93617), abs=1e-4)  # the galactic centre
    assert source.coordinates("c.fits") == pytest.approx((10.0, 20.0), abs=1e-9)
    assert [source.coordinates(id_) for id_ in ("d.fits", "e.fits", "f.fits")] == [None, None, None]


def test_messages(tmp_path: Path) -> None:
    (tmp_path / "a.fits").write_text("x")
    (tmp_path / "b.fits").write_text("x")
    with pytest.raises(DataError, match=r"none of the first 2 can be used, the first is a\.fits: it is no FITS file"):
        FitsSource(tmp_path)
