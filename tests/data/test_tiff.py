import io
import logging
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from anomalymatch.data.codecs import decode
from anomalymatch.data.tiff import tiff_bands
from anomalymatch.errors import UnreadableImageError

RNG = np.random.default_rng(0)
SMOOTH = (np.add.outer(np.arange(48), np.arange(64))[..., None] + np.array([0, 40, 90])).astype(np.uint8)
TYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
LOSSLESS = ["lzw", "deflate", "packbits", "zstd", "lzma", "png", "jpegxl", "jpeg2000", "webp", "lerc"]


def pixels(kind: str, *shape: int) -> np.ndarray:
    if kind[0] == "f":
        return RNG.normal(0, 100, shape).astype(kind)
    limits = np.iinfo(kind)
    return RNG.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def test_every_number_type_layout_and_byte_order() -> None:
    for kind in TYPES:
        for channels in (1, 3, 4):
            array = pixels(kind, 20, 33, channels)
            photometric = {1: "minisblack", 3: "rgb", 4: "rgb"}[channels]
            options: dict[str, Any] = {"photometric": photometric}
            if channels == 4:
                options["extrasamples"] = ["unassalpha"]
            contiguous = array if channels > 1 else array[..., 0]
            separate = {"planarconfig": "separate"} if channels > 1 else {}
            for data in (
                tiff(contiguous, **options),
                tiff(np.moveaxis(array, 2, 0), **separate, **options),
                tiff(contiguous, tile=(16, 16), bigtiff=True, byteorder=">", **options),
                tiff(contiguous, rowsperstrip=7, byteorder=">", **options),
            ):
                decoded = decode(data, channels)
                assert (decoded.dtype, decoded.shape) == (np.dtype(kind), array.shape)
                np.testing.assert_array_equal(decoded, array)
                assert decoded.flags.writeable
                decoded[0] = 0


@pytest.mark.parametrize("compression", LOSSLESS)
def test_lossless_compressions(compression: str) -> None:
    data = tiff(SMOOTH, photometric="rgb", compression=compression, rowsperstrip=16)
    np.testing.assert_array_equal(decode(data, 3), SMOOTH)


@pytest.mark.parametrize(("kind", "predictor"), [("u1", 2), ("u2", 2), ("u4", 2), ("f4", 3), ("f8", 3)])
def test_predictors(kind: str, predictor: int) -> None:
    array = pixels(kind, 20, 30, 3)
    data = tiff(array, photometric="rgb", compression="deflate", predictor=predictor)
    np.testing.assert_array_equal(decode(data, 3), array)


@pytest.mark.parametrize("compression", ["jpeg", "jpegxr"])
def test_lossy_compressions_are_close(compression: str) -> None:
    for options in ({}, {"tile": (16, 16)}):
        data = tiff(SMOOTH, photometric="rgb", compression=compression, compressionargs={"level": 95}, **options)
        assert np.abs(decode(data, 3).astype(int) - SMOOTH).max() <= 6


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_jpeg_in_ycbcr(subsampling: str) -> None:
    """Decode files that libtiff (through Pillow) and tifffile have written."""
    buffer = io.BytesIO()
    PillowImage.fromarray(SMOOTH).save(buffer, "TIFF", compression="jpeg", quality=100)
    sampling = (1, 1) if subsampling == "4:4:4" else (2, 2)
    written = tiff(SMOOTH, photometric="rgb", compression="jpeg", subsampling=sampling, compressionargs={"level": 100})
    for data in (buffer.getvalue(), written):
        assert np.abs(decode(data, 3).astype(int) - SMOOTH).max() <= 3


def test_pictures_of_pillow() -> None:
    rgb = PillowImage.fromarray(SMOOTH)
    for mode in ("1", "L", "P", "RGB", "CMYK", "LA", "RGBA"):
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            buffer = io.BytesIO()
            image = rgb.convert("L").convert("LA") if mode == "LA" else rgb.convert(mode)
            image.save(buffer, "TIFF", compression=compression)
            np.testing.assert_array_equal(decode(buffer.getvalue(), 3), np.asarray(image.convert("RGB")))
    for compression in ("group3", "group4", "tiff_ccitt"):
        buffer = io.BytesIO()
        rgb.convert("1").save(buffer, "TIFF", compression=compression)
        np.testing.assert_array_equal(decode(buffer.getvalue(), 1)[..., 0], np.asarray(rgb.convert("1").convert("L")))


def test_white_is_zero() -> None:
    grey = np.array([[0, 10, 255]], dtype=np.uint8)
    assert decode(tiff(grey, photometric="miniswhite"), 1)[..., 0].tolist() == [[255, 245, 0]]
    deep = np.array([[0, 10, 65535]], dtype=np.uint16)
    assert decode(tiff(deep, photometric="miniswhite"), 1)[..., 0].tolist() == [[65535, 65525, 0]]
    assert decode(tiff(np.array([[True, False]]), photometric="miniswhite"), 1)[..., 0].tolist() == [[0, 255]]


def test_few_bits_are_scaled_to_8_and_more_than_8_are_kept() -> None:
    for bits, values, expected in ((4, [0, 7, 15], [0, 119, 255]), (12, [0, 7, 4095], [0, 7, 4095])):
        kind = np.uint8 if bits < 8 else np.uint16
        grey = np.array([values], dtype=kind)
        data = tiff(grey, photometric="minisblack", bitspersample=bits)
        assert decode(data, 1)[..., 0].tolist() == [expected]


def test_palettes() -> None:
    colours = RNG.integers(0, 256, (3, 256), dtype=np.uint16)
    index = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
    data = tiff(index, photometric="palette", colormap=colours * 257)
    np.testing.assert_array_equal(decode(data, 3), colours.astype(np.uint8).T[index])


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
def test_grey_and_alpha(kind: str) -> None:
    top = 1 if kind == "f4" else np.iinfo(kind).max
    array = np.array([[[100, top], [60, 0]]], dtype=kind)
    data = tiff(array, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    assert decode(data, 1)[..., 0].tolist() == [[100, 0]]
    assert decode(data, 4).tolist() == [[[100, 100, 100, top], [60, 60, 60, 0]]]


def test_premultiplied_alpha() -> None:
    array = np.array([[[50, 40, 30, 51], [100, 100, 100, 255]]], dtype=np.uint8)
    data = tiff(array, photometric="rgb", extrasamples=["assocalpha"])
    assert decode(data, 3).tolist() == [[[50, 40, 30], [100, 100, 100]]]
    assert decode(data, 3, background=100).tolist() == [[[130, 120, 110], [100, 100, 100]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PillowImage.fromarray(SMOOTH).save(buffer, "TIFF", exif=exif)
    with PillowImage.open(io.BytesIO(buffer.getvalue())) as image:  # Pillow turns a TIFF as it loads
        np.testing.assert_array_equal(decode(buffer.getvalue(), 3), np.asarray(image))


GDAL = "<GDALMetadata>{}</GDALMetadata>"
ITEM = '<Item name="DESCRIPTION" sample="{}" role="description">{}</Item>'


def gdal(array: np.ndarray, names: list[str], **options: Any) -> bytes:
    text = GDAL.format("".join(ITEM.format(n, name) for n, name in enumerate(names)))
    return tiff(array, photometric="minisblack", extratags=[(42112, "s", 0, text, True)], **options)


@pytest.mark.parametrize("count", [4, 5, 8, 12])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_of_remote_sensing(count: int, planar: str) -> None:
    array = pixels("u2", 9, 11, count)
    stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
    plain = tiff(stored, photometric="minisblack", planarconfig=planar)
    numbered = tuple(f"band{i}" for i in range(count))
    assert tiff_bands(plain) == numbered
    np.testing.assert_array_equal(decode(plain, count, bands=numbered), array)
    with pytest.raises(UnreadableImageError, match=rf"{count} bands, .*dataset\.source\.bands"):
        decode(plain, 3)
    with pytest.raises(UnreadableImageError, match=rf"{count} bands instead of 2: a, b"):
        decode(plain, 2, bands=["a", "b"])
    names = [f"B{i:02d}" for i in range(count)]
    named = gdal(stored, names, planarconfig=planar)
    assert tiff_bands(named) == tuple(names)
    np.testing.assert_array_equal(decode(named, count, bands=names[::-1]), array[..., ::-1])
    np.testing.assert_array_equal(decode(named, count, bands=numbered), array)


def test_holes_that_gdal_names_are_nan() -> None:
    array = np.array([[-9999.0, 2.0], [3.0, -9999.0]], np.float32)
    data = tiff(array, photometric="minisblack", extratags=[(42113, "s", 0, "-9999", True)])
    np.testing.assert_array_equal(decode(data, 1)[..., 0], [[np.nan, 2], [3, np.nan]])


@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_channels_of_microscopes(kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalymatch.data.tiff._said", set())
    array = pixels("u2", 2, 3, 4, 20, 21)
    options = {"ome": {"Channel": {"Name": ["DAPI", "GFP", "RFP", "Cy5"]}}, "imagej": {}}[kind]
    data = tiff(array, metadata={"axes": "TZCYX", **options}, **{kind: True})
    names = tiff_bands(data)
    assert names == (("DAPI", "GFP", "RFP", "Cy5") if kind == "ome" else ("band0", "band1", "band2", "band3"))
    for _ in range(2):
        np.testing.assert_array_equal(decode(data, 4, bands=names), np.moveaxis(array[0, 0], 0, 2))
    assert caplog.text.count("several pages") == 1


def test_only_the_first_page_of_a_stack_is_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomalymatch.data.tiff._said", set())
    stack = pixels("u2", 5, 12, 13)
    stacked = {"metadata": {"axes": "ZYX"}}
    for options in ({}, {"ome": True, **stacked}, {"imagej": True, **stacked}):
        np.testing.assert_array_equal(decode(tiff(stack, photometric="minisblack", **options), 1)[..., 0], stack[0])
    assert caplog.text.count("several pages") == 1
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:  # pages of different sizes
        writer.write(SMOOTH, photometric="rgb")
        writer.write(stack[0], photometric="minisblack")
    np.testing.assert_array_equal(decode(buffer.getvalue(), 3), SMOOTH)


def test_other_files_of_an_ome_set_are_not_opened(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array = pixels("u2", 2, 12, 13)
    data = tiff(array, ome=True, metadata={"axes": "CYX"})
    (tmp_path / "secret.tif").write_bytes(tiff(array[::-1], ome=True, metadata={"axes": "CYX"}))
    monkeypatch.chdir(tmp_path)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        text = file.ome_metadata or ""
    start, end = text.index("<TiffData"), text.index("/>", text.index("<TiffData")) + 2
    other = '<UUID FileName="secret.tif">urn:uuid:1</UUID></TiffData>'
    linked = f'<TiffData FirstC="0" IFD="0" PlaneCount="1"/><TiffData FirstC="1" IFD="0" PlaneCount="1">{other}'
    forged = tiff(array[0], description=text[:start] + linked + text[end:], metadata=None, photometric="minisblack")
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda *args, **options: opened.append(args))
    with pytest.raises(UnreadableImageError):
        decode(forged, 2, bands=["a", "b"])
    assert not opened


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "jpeg", "jpegxr", "jpeg2000"])
def test_incomplete_files_are_rejected(compression: str | None) -> None:
    data = tiff(SMOOTH, photometric="rgb", compression=compression, rowsperstrip=16)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        end = file.pages.first.dataoffsets[-1] + file.pages.first.databytecounts[-1]
    for cut in (1, 10, 200):
        with pytest.raises(UnreadableImageError):
            decode(data[: end - cut], 3)


def changed(data: bytes, tag: int, value: int) -> bytes:
    """Overwrite the value of a tag in the first page."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = file.pages.first.tags[tag]
        place = found.valueoffset
        kind = {3: "H", 4: "I"}[int(found.dtype)]
    return data[:place] + struct.pack(f"<{kind}", value) + data[place + struct.calcsize(kind) :]


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "png", "jpegxl", "jpeg"])
def test_fewer_samples_than_the_header_says(compression: str | None) -> None:
    data = tiff(SMOOTH, photometric="rgb", compression=compression, rowsperstrip=48)
    for tag, value in ((257, 64), (256, 80)):  # height, width
        taller = changed(changed(data, tag, value), 278, 64)
        with pytest.raises(UnreadableImageError):
            decode(taller, 3)


def test_missing_and_shared_strips_are_rejected() -> None:
    array = pixels("u1", 512, 64)
    data = tiff(array, photometric="minisblack", rowsperstrip=1, compression="deflate")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offsets, counts = (file.pages.first.tags[tag] for tag in (273, 279))
    size = {3: "H", 4: "I"}[int(counts.dtype)]
    start, width = counts.valueoffset, struct.calcsize(size)
    none = data[:start] + bytes(width) + data[start + width :]
    with pytest.raises(UnreadableImageError, match="511 of the 512"):
        decode(none, 1)
    first = int(offsets.value[0])
    shared = bytearray(data)
    shared[offsets.valueoffset : offsets.valueoffset + 4 * 512] = struct.pack("<512I", *[first] * 512)
    long = struct.pack(f"<512{size}", *[len(data) // 4] * 512)
    shared[start : start + len(long)] = long
    with pytest.raises(UnreadableImageError, match="share bytes"):
        decode(bytes(shared), 1)


@pytest.mark.parametrize("compression", ["jpeg", "png", "webp", "jpeg2000"])
def test_strips_that_hold_a_larger_image_are_refused(compression: str) -> None:
    large = np.zeros((1024, 1024, 3), np.uint8)
    payload = getattr(imagecodecs, compression.replace("2000", "2k") + "_encode")(large)
    data = tiff(SMOOTH, photometric="rgb", compression=compression, rowsperstrip=48)
    forged = changed(changed(data, 273, len(data)), 279, len(payload)) + payload
    with pytest.raises(UnreadableImageError, match="64 x 48 pixels holds an image of 1024 x 1024"):
        decode(forged, 3)


def test_large_images_are_refused_before_decoding() -> None:
    data = changed(changed(tiff(SMOOTH, photometric="rgb", rowsperstrip=48), 256, 2**17), 257, 2**17)
    with pytest.raises(UnreadableImageError, match=r"131072 x 131072 pixels .*max_pixels"):
        decode(data, 3)
    with pytest.raises(UnreadableImageError, match=r"64 x 48 pixels .*3,071 \(max_pixels"):
        decode(tiff(SMOOTH, photometric="rgb"), 3, max_pixels=64 * 48 - 1)
    cube = tiff(pixels("u1", 48, 64, 12), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImageError, match="12 bands"):
        decode(cube, 12, bands=[str(i) for i in range(12)], max_pixels=64 * 48 * 2)


@given(
    compression=st.sampled_from([None, "lzw", "deflate", "jpeg", "jpegxl", "zstd"]),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_damage_gives_pixels_or_a_reason_and_no_noise(compression: str | None, edits: list[tuple[int, int]]) -> None:
    data = bytearray(tiff(SMOOTH, photometric="rgb", compression=compression, rowsperstrip=16))
    for place, value in edits:
        data[place % len(data)] = value
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("tifffile").addHandler(handler)
    try:
        assert decode(bytes(data), 3).shape[2] == 3
    except UnreadableImageError:
        pass
    finally:
        logging.getLogger("tifffile").removeHandler(handler)
    assert not records
