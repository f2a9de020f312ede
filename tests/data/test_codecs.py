import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from anomalymatch.data.codecs import decode, with_channels
from anomalymatch.errors import DataError, UnreadableImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGB = PillowImage.fromarray(PIXELS)


def encode(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lossless_formats_come_back_exactly(kind: str, channels: int) -> None:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    image = RGB.convert("RGBA").convert(mode)
    expected = np.asarray(image).reshape(20, 30, channels)
    decoded = decode(encode(image, kind), channels)
    assert np.array_equal(decoded, expected)
    assert decoded.flags.writeable


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (RGB, "JPEG"),
        (RGB.convert("CMYK"), "JPEG"),
        (RGB, "WEBP"),
        (RGB.convert("P"), "GIF"),
        (RGB.convert("P"), "PNG"),
        (RGB.convert("LA"), "PNG"),
        (RGB.convert("1"), "PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_the_requested_channels(image: PillowImage.Image, kind: str, channels: int) -> None:
    transparent = {"transparency": bytes(range(200))} if image.mode == "P" and kind == "PNG" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(encode(image, kind, **transparent), channels).shape == (20, 30, channels)
    assert not caught


def test_grey_and_alpha_keeps_the_grey() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = PillowImage.merge("LA", [PillowImage.fromarray(grey), PillowImage.new("L", (3, 2), 128)])
    assert np.array_equal(decode(encode(image, "PNG"), 3)[..., 1], grey)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_keeps_its_values(kind: str) -> None:
    values = np.array([[1000, 2000], [3000, 65535]], dtype=np.uint16)
    decoded = decode(encode(PillowImage.fromarray(values), kind), 3)
    assert decoded.shape == (2, 2, 3)
    assert all(np.array_equal(decoded[..., k], values) for k in range(3))


def test_float_tiff_keeps_its_values() -> None:
    values = np.array([[np.nan, -1.5], [np.inf, 3e38]], dtype=np.float32)
    decoded = decode(encode(PillowImage.fromarray(values), "TIFF"), 1)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded[..., 0], values)


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint16), (".tiff", np.uint16), (".tiff", np.float32)])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_keeps_its_values_and_the_order_of_its_channels(suffix: str, dtype: type, channels: int) -> None:
    values = (np.arange(2 * 3 * channels).reshape(2, 3, channels) * 700 + 3).astype(dtype)
    blue_first = values[..., [2, 1, 0, 3][:channels]]
    data = cv2.imencode(suffix, blue_first)[1].tobytes()
    decoded = decode(data, channels)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, values)
    with pytest.raises(UnreadableImageError):
        decode(data[: len(data) // 2], channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_decodes(channels: int) -> None:
    smooth = PillowImage.fromarray(cv2.GaussianBlur(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)), (0, 0), 5))
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}):
        data = encode(smooth, "JPEG", **options)
        pillow = np.asarray(PillowImage.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
        difference = decode(data, channels).astype(int) - pillow.reshape(*pillow.shape[:2], channels)
        assert np.abs(difference).max() <= (2 if channels == 1 else 0)


def test_conversions_between_numbers_of_channels() -> None:
    grey = np.array([[10, 20]], dtype=np.uint16)
    assert with_channels(grey, 3).tolist() == [[[10, 10, 10], [20, 20, 20]]]
    assert with_channels(grey, 4)[0, 0].tolist() == [10, 10, 10, 65535]
    colour = np.array([[[100, 200, 50, 7]]], dtype=np.uint8)
    assert with_channels(colour, 3)[0, 0].tolist() == [100, 200, 50]
    assert with_channels(colour, 1)[0, 0].tolist() == [round(0.299 * 100 + 0.587 * 200 + 0.114 * 50)]
    assert with_channels(colour.astype(np.float32), 1)[0, 0, 0] == pytest.approx(153.0)
    assert with_channels(colour[..., :3].astype(np.float32), 4)[0, 0].tolist() == [100, 200, 50, 1]
    with pytest.raises(UnreadableImageError, match=r"2 .* 3"):
        with_channels(colour[..., :2], 3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_exif_rotation_is_applied(kind: str) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    upright = decode(encode(RGB, kind, exif=exif), 3)
    assert np.array_equal(upright, np.rot90(decode(encode(RGB, kind), 3), k=-1))


def test_broken_exif_is_ignored() -> None:
    assert decode(encode(RGB, "JPEG", exif=b"Exif\0\0MM\0*garbage"), 3).shape == (20, 30, 3)


@pytest.mark.parametrize(("width", "height"), [(9_800, 9_800), (12_000, 12_000), (50_000, 50_000)])
def test_decompression_bomb_is_refused_without_a_warning(width: int, height: int) -> None:
    with pytest.raises(UnreadableImageError, match=r"pixels|truncated"):
        decode(png_header(width, height), 3)


def test_bytes_that_are_no_image() -> None:
    with pytest.raises(UnreadableImageError, match=r"empty \(0 bytes\)"):
        decode(b"", 3)
    with pytest.raises(UnreadableImageError, match="JPEG, PNG"):
        decode(b"some text", 3)
    with pytest.raises(UnreadableImageError, match="not an image"):  # Pillow would start Ghostscript
        decode(encode(RGB, "EPS"), 3)
    with pytest.raises(DataError, match=r"1, 3, 4.* 2"):
        decode(encode(RGB, "PNG"), 2)


@given(kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"]), share=st.floats(0, 0.95))
@settings(max_examples=150, deadline=None)
def test_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encode(RGB, kind)
    with pytest.raises(UnreadableImageError):
        decode(data[: int(len(data) * share)], 3)


@given(
    kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_damaged_image_decodes_or_is_refused(kind: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(encode(RGB, kind))
    for place, value in edits:
        data[place % len(data)] = value
    with suppress(UnreadableImageError):
        assert decode(bytes(data), 3).shape[2] == 3


def test_warnings_of_damaged_images_are_ignored_in_threads_and_no_filter_is_left() -> None:
    data = [png_header(9_800, 9_700), encode(RGB, "TIFF")[:137], encode(RGB, "JPEG"), encode(RGB, "PNG")] * 4
    before = list(warnings.filters)

    def attempt(item: bytes) -> bool:
        try:
            return bool(decode(item, 3).size)
        except UnreadableImageError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, data)) == [False, False, True, True] * 4
    assert list(warnings.filters) == before
