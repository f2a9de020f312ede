"""Contact sheets of images with captions, for reports and trackers."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from anomalymatch.files import atomic_file
from anomalymatch.text import printable
from anomalymatch.types import Image, Images, Label

FRAME_COLOURS = {Label.ANOMALY: "#E8702A", Label.NORMAL: "#56B4E9", Label.UNSURE: "#F0E442", Label.ARTEFACT: "#CC79A7"}
"""Frame colour of each label, distinct for colour-blind readers on a dark sheet; unlabelled images have no frame."""
PAPER, WELL, TEXT = "#14171C", "#1E232B", "#D5DAE1"
MARGIN, GAP, FRAME, CAPTION_GAP = 14, 10, 3, 5
FONT_SIZE, LINE_HEIGHT = 11, 15


def contact_sheet(
    images: Images,
    captions: Sequence[str],
    *,
    columns: int = 8,
    tile: int = 112,
    frames: Sequence[str | None] = (),
) -> PillowImage.Image:
    """Draw images with captions on a dark sheet.

    Each image is fitted into a square tile without distortion, in colours as in `as_rgb`.

    Args:
        images: decoded images of any sizes.
        captions: one per image, of one or several lines; lines too wide for the tile are shortened in the middle,
            where ids differ least.
        columns: tiles in a row, at least 1.
        tile: side of a tile in pixels, at least 16.
        frames: a colour (`#rrggbb` or a name) or None per image, see `FRAME_COLOURS`; empty for no frames.

    Raises:
        ValueError: if the lengths differ, or `columns` or `tile` is too small.
    """
    if len(captions) != len(images) or (frames and len(frames) != len(images)):
        raise ValueError(f"expected {len(images)} captions and frames, got {len(captions)} and {len(frames)}")
    if columns < 1 or tile < 16:
        raise ValueError(f"expected columns >= 1 and tile >= 16, got {columns} and {tile}")
    if not images:
        images, captions = [np.empty((0, 0, 3), np.uint8)], ["no images"]
    font = caption_font()
    lines = [[_shorten(line, font, tile) for line in caption.split("\n")] for caption in captions]
    columns = min(columns, len(images))
    text_height = LINE_HEIGHT * max(map(len, lines))
    step_x, step_y = tile + GAP, tile + CAPTION_GAP + text_height + GAP
    rows = -(-len(images) // columns)
    size = (2 * MARGIN + columns * step_x - GAP, 2 * MARGIN + rows * step_y - GAP)
    sheet = PillowImage.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        x, y = MARGIN + place % columns * step_x, MARGIN + place // columns * step_y
        _draw_tile(sheet, draw, image, (x, y), tile, frames[place] if frames else None)
        for number, line in enumerate(lines[place]):
            at = (x + tile / 2, y + tile + CAPTION_GAP + number * LINE_HEIGHT)
            draw.text(at, line, fill=TEXT, font=font, anchor="ma")
    return sheet


def caption_font() -> ImageFont.FreeTypeFont:
    """Load the font of the captions."""
    # matplotlib ships this font on all platforms, with more scripts than Pillow's default.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE)


def save_sheet(sheet: PillowImage.Image, path: Path) -> None:
    """Write a contact sheet as a PNG file, atomically."""
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _draw_tile(
    sheet: PillowImage.Image,
    draw: ImageDraw.ImageDraw,
    image: Image,
    corner: tuple[int, int],
    tile: int,
    frame: str | None,
) -> None:
    x, y = corner
    draw.rectangle((x, y, x + tile - 1, y + tile - 1), fill=WELL)
    # Every tile has space for a frame, so that framed and plain images have the same scale.
    room = tile - 2 * FRAME
    if image.size:
        fitted = _fit(PillowImage.fromarray(as_rgb(image)), room)
        left, top = x + FRAME + (room - fitted.width) // 2, y + FRAME + (room - fitted.height) // 2
        sheet.paste(fitted, (left, top))
    if frame is not None:
        draw.rectangle((x, y, x + tile - 1, y + tile - 1), outline=frame, width=FRAME)


def as_rgb(image: Image) -> UInt8[np.ndarray, "h w 3"]:
    """Convert any number of channels to three: grey is repeated, two become a false colour, of more the first three."""
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 2:
        middle = image.mean(axis=2).astype(np.uint8)
        return np.stack([image[..., 0], middle, image[..., 1]], axis=2)
    return np.ascontiguousarray(image[..., :3])


def _fit(image: PillowImage.Image, side: int) -> PillowImage.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Lanczos makes rings around bright stars, and nearest uneven pixels at scales like 1.7. Pillow's bicubic filter
    # averages over the whole source area when it reduces an image.
    return image.resize(size, PillowImage.Resampling.BICUBIC)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten `text` in the middle to at most `width` pixels; unprintable characters become `?`."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    kept = 1
    while kept < len(text) and font.getlength(_elide(text, kept + 1)) <= width:
        kept += 1
    return _elide(text, kept)


def _elide(text: str, kept: int) -> str:
    """Keep `kept` characters of `text`: half from its start and half, or one more, from its end."""
    start = kept // 2
    return f"{text[:start]}…{text[len(text) - (kept - start) :]}"
