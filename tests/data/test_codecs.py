import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import cv2
import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from PIL import ImageOps

from anomalymatch.data import tiff
from anomalymatch.data.codecs import decode, default_max_pixels, with_channels
from anomalymatch.errors import DataError, UnreadableImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGB = PillowImage.fromarray(PIXELS)


def encode(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + end


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


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP"), ("LA", "PNG"), ("LA", "TIFF"), ("P", "PNG")]
)
def test_transparent_parts_show_the_background(
    mode: str, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiff, "_said", set())
    options: dict[str, object] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    if mode == "P":
        image = PillowImage.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        image.putpalette([200, 200, 200, 100, 100, 100, 50, 50, 50])
        options["transparency"] = bytes([255, 51, 0])
    else:
        pixels = np.array([[[200, 200, 200, 255], [100, 100, 100, 51], [50, 50, 50, 0]]], np.uint8)
        image = PillowImage.fromarray(pixels if mode == "RGBA" else np.ascontiguousarray(pixels[..., [0, 3]]), mode)
    data = encode(image, kind, **options)
    for channels in (1, 3):
        assert decode(data, channels)[0, :, 0].tolist() == [200, 20, 0]
        assert decode(data, channels, background=255)[0, :, 0].tolist() == [200, 224, 255]
    assert decode(data, 3, background=[10, 20, 30])[0, 2].tolist() == [10, 20, 30]
    assert decode(data, 4)[0, :, 3].tolist() == [255, 51, 0]
    assert caplog.text.count("channels_background") == 1


def deep_png(values: np.ndarray, orientation: int = 1) -> bytes:
    """Write a 16-bit PNG with EXIF data."""
    data = imagecodecs.png_encode(values)
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    return data[:33] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[33:]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_deep_png_keeps_its_values_and_is_upright(channels: int, orientation: int) -> None:
    values = (np.arange(2 * 3 * channels).reshape(2, 3, channels) * 700 + 3).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    turned = {1: values, 3: values[::-1, ::-1], 6: np.rot90(values, -1), 7: np.rot90(values, -1)[::-1]}[orientation]
    if orientation == 7:
        turned = values.swapaxes(0, 1)[::-1, ::-1]
    data = deep_png(values.squeeze(), orientation)
    decoded = decode(data, 4)
    colours = turned[..., :3] if channels > 2 else turned[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(decoded[..., :3], colours, strict=True)
    assert (decoded[..., 3] == 65535).all()
    np.testing.assert_array_equal(decode(data, 3), colours)
    with pytest.raises(UnreadableImageError):
        decode(data[: len(data) // 2], channels if channels != 2 else 3)


def test_deep_png_with_transparency() -> None:
    rgba = np.array([[[1000, 2000, 3000, 0], [1000, 2000, 3000, 13107], [7, 8, 9, 65535]]], np.uint16)
    data = imagecodecs.png_encode(rgba)
    assert decode(data, 3).tolist() == [[[0, 0, 0], [200, 400, 600], [7, 8, 9]]]
    assert decode(data, 3, background=255)[0, 0].tolist() == [65535] * 3
    np.testing.assert_array_equal(decode(data, 4), rgba)
    rgb = imagecodecs.png_encode(np.ascontiguousarray(rgba[..., :3]))
    key = rgb[:33] + png_chunk(b"tRNS", struct.pack(">3H", 7, 8, 9)) + rgb[33:]
    assert decode(key, 3).tolist() == [[[1000, 2000, 3000], [1000, 2000, 3000], [0, 0, 0]]]


def test_default_image_of_an_animation_that_is_no_frame() -> None:
    """The 16-bit PNG shows the image outside the animation, as viewers without animation do, not the first frame."""
    still, frame = (np.full((4, 5, 3), colour, np.uint16) for colour in ([0, 0, 60000], [60000, 0, 0]))
    plain, other = imagecodecs.png_encode(still), imagecodecs.png_encode(frame)
    start = other.index(b"IDAT")
    inner = other[start + 4 : start + 4 + int.from_bytes(other[start - 4 : start])]
    animation = png_chunk(b"fcTL", struct.pack(">5I2H2B", 0, 5, 4, 0, 0, 1, 10, 0, 0))
    animation += png_chunk(b"fdAT", struct.pack(">I", 1) + inner)
    data = plain[:33] + png_chunk(b"acTL", struct.pack(">2I", 1, 0)) + plain[33:-12] + animation + plain[-12:]
    np.testing.assert_array_equal(decode(data, 3), still)


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_a_jpeg_as_pillow_turns_it(channels: int, orientation: int) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, "JPEG", exif=exif)
    image = ImageOps.exif_transpose(PillowImage.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    assert np.array_equal(decode(data, channels).squeeze(), np.asarray(image))
    end = data.index(b"\xff\xdb")  # the first table: EXIF behind many and long segments
    exif_segment, rest = data[2:end], data[end:]
    for before in (b"\xff\xe2" + struct.pack(">H", 65000) + bytes(64998), b"\xff\xfe\0\7Exif\0"):
        moved = data[:2] + before * 3 + exif_segment + rest
        assert np.array_equal(decode(moved, channels), decode(data, channels))


def test_broken_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0MM\0*garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert decode(encode(RGB, "JPEG", exif=exif), 3).shape == (20, 30, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("at_least", "factor"), [(161, 1), (160, 2), (81, 2), (80, 4), (40, 8), (5, 8)])
def test_large_jpegs_are_decoded_at_a_reduced_scale(channels: int, at_least: int, factor: int) -> None:
    smooth = PillowImage.fromarray(cv2.GaussianBlur(np.kron(PIXELS, np.ones((16, 16, 1), np.uint8)), (0, 0), 8))
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    for options, turns in (({}, 0), ({"exif": exif}, -1)):
        data = encode(smooth, "JPEG", quality=95, **options)
        reduced = decode(data, channels, at_least=at_least)
        whole = np.rot90(np.asarray(smooth.convert("L" if channels == 1 else "RGB")), turns)
        expected = cv2.resize(whole, reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert reduced.shape[:2] == tuple(-(-side // factor) for side in whole.shape[:2])
        assert np.abs(reduced.squeeze().astype(int) - expected).max() <= 8


def test_limit_of_the_pixels() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        assert decode(encode(RGB, kind), 3, max_pixels=600).shape == (20, 30, 3)
        with pytest.raises(UnreadableImageError, match=r"30 x 20 pixels .*599 \(max_pixels"):
            decode(encode(RGB, kind), 3, max_pixels=599)
    assert 10**6 < default_max_pixels() < 10**11


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
