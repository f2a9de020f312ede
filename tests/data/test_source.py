import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from anomalymatch.data.codecs import decode
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import BaseSource, ImageSource
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

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
def test_every_mode_becomes_the_channels_asked_for(image: PillowImage.Image, kind: str, channels: int) -> None:
    assert decode(encode(image, kind), channels).shape == (20, 30, channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_palette_with_transparency_per_colour_gives_no_warning(channels: int) -> None:
    data = encode(RGB.convert("P"), "PNG", transparency=bytes(range(200)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(data, channels).shape == (20, 30, channels)
    assert not caught


def test_grey_and_alpha_keeps_the_grey() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = PillowImage.merge("LA", [PillowImage.fromarray(grey), PillowImage.new("L", (3, 2), 128)])
    assert np.array_equal(decode(encode(image, "PNG"), 3)[..., 1], grey)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(kind: str) -> None:
    values = np.array([[1000, 2000], [3000, 1000]], dtype=np.uint16)
    assert decode(encode(PillowImage.fromarray(values), kind), 1)[..., 0].tolist() == [[0, 128], [255, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 1.0, 2.0]], [[0, 128, 255]]),
        ([[np.nan, -1.0, 1.0]], [[0, 0, 255]]),
        ([[-np.inf, 0.0, 1.0, np.inf]], [[0, 0, 255, 255]]),
        ([[5.0, 5.0]], [[0, 0]]),
        ([[3e38, -3e38]], [[255, 0]]),
    ],
)
def test_floats_are_scaled_by_their_finite_range(values: list[list[float]], expected: list[list[int]]) -> None:
    data = encode(PillowImage.fromarray(np.array(values, dtype=np.float32)), "TIFF")
    assert decode(data, 1)[..., 0].tolist() == expected


def test_image_of_nothing_but_nan_is_refused() -> None:
    data = encode(PillowImage.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF")
    with pytest.raises(UnreadableImageError, match="no finite pixel value"):
        decode(data, 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_photo_taken_sideways_is_turned(kind: str) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    upright = decode(encode(RGB, kind, exif=exif), 3)
    assert np.array_equal(upright, np.rot90(decode(encode(RGB, kind), 3), k=-1))


def test_broken_exif_does_not_matter() -> None:
    assert decode(encode(RGB, "JPEG", exif=b"Exif\0\0MM\0*garbage"), 3).shape == (20, 30, 3)


@pytest.mark.parametrize(("width", "height"), [(9_800, 9_800), (12_000, 12_000), (50_000, 50_000)])
def test_decompression_bomb_is_refused_without_a_warning(width: int, height: int) -> None:
    with pytest.raises(UnreadableImageError, match=r"pixels|truncated"):
        decode(png_header(width, height), 3)


def test_messages_about_no_image() -> None:
    with pytest.raises(UnreadableImageError, match=r"empty \(0 bytes\)"):
        decode(b"", 3)
    with pytest.raises(UnreadableImageError, match="not an image in one of the formats JPEG, PNG"):
        decode(b"some text", 3)
    with pytest.raises(UnreadableImageError, match="not an image"):  # Pillow would start Ghostscript
        decode(encode(RGB, "EPS"), 3)
    with pytest.raises(DataError, match="channels must be one of 1, 3, 4, got 2"):
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
@settings(max_examples=300, deadline=None)
def test_damaged_image_decodes_or_is_refused_but_does_nothing_else(kind: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(encode(RGB, kind))
    for place, value in edits:
        data[place % len(data)] = value
    with suppress(UnreadableImageError):
        assert decode(bytes(data), 3).shape[2] == 3


def test_many_threads_silence_warnings_together() -> None:
    data = [png_header(9_800, 9_700), encode(RGB, "TIFF")[:137], encode(RGB, "JPEG")] * 8

    def attempt(item: bytes) -> bool:
        try:
            return bool(decode(item, 3).size)
        except UnreadableImageError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, data)) == [False, False, True] * 8


class _Source(BaseSource):
    def _load(self, position: int) -> Image:
        if position == 1:
            raise UnreadableImageError("broken")
        return np.full((2, 2, 1), position, dtype=np.uint8)


def test_base_source_keeps_the_order_and_rejects_what_is_unreadable() -> None:
    source = _Source(name="set", ids=["a", "b", "c"], channels=1, fingerprint="x")
    assert isinstance(source, ImageSource)
    assert len(source) == 3
    first, second, third = source.read(["c", "b", "c"])
    assert first[0, 0, 0] == third[0, 0, 0] == 2
    assert second == Reject("b", "broken")


def test_base_source_refuses_unknown_and_repeated_ids_and_no_ids() -> None:
    with pytest.raises(DataError, match="set has no image 'z'"):
        _Source(name="set", ids=["a"], channels=1, fingerprint="x").read(["z"])
    with pytest.raises(DataError, match="1 ids occur more than once"):
        _Source(name="set", ids=["a", "a"], channels=1, fingerprint="x")
    with pytest.raises(DataError, match="no images"):
        _Source(name="set", ids=[], channels=1, fingerprint="x")
