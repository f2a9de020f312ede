"""Heat maps: signed values by place, drawn over images, on sheets and as a legend."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib import colormaps
from PIL import Image as PillowImage
from PIL import ImageDraw

from anomalymatch.data.stream import central_square
from anomalymatch.evaluation.contact_sheet import MARGIN, PAPER, TEXT, as_rgb, caption_font, contact_sheet
from anomalymatch.types import Image, Images

HeatMap = Float32[np.ndarray, "a b"]
"""Values between -1 and 1 on the square that the network saw."""
WARM, COLD = 0.6, 0.4
"""Opacity at the values 1 and -1."""
BLUE = (40.0, 110.0, 255.0)
SMOOTHING = 0.05
"""Standard deviation of the smoothing, as a share of the side."""
AGAINST = 0.05
LEGEND_SIDES = 12, 160


def scale_evidence(evidence: Float32[np.ndarray, "a a"]) -> HeatMap:
    """Smooth a map of evidence and scale it; zero stays zero.

    The strongest place that speaks for an anomaly becomes 1, unless more than `AGAINST` of the places speak against it
    still more strongly. Negative values are cut at -1: the padding of a network leaves strong ones at edges.
    """
    smooth = cv2.GaussianBlur(evidence, (0, 0), SMOOTHING * len(evidence), borderType=cv2.BORDER_REFLECT)
    largest = max(float(smooth.max()), float(np.quantile(np.abs(smooth), 1 - AGAINST)))
    return (smooth / largest).clip(-1) if largest > 0 else np.zeros_like(smooth)


def overlay(image: Image, heat: HeatMap, fit: str) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a heat map over an image: warm where it is positive, blue where it is negative, nothing where it is zero.

    The map covers the square that `fit` (see `data.stream.resize`) made of the image: with `crop`, nothing is drawn on
    the rest of the image.
    """
    height, width = image.shape[:2]
    longer, shorter = max(height, width), min(height, width)
    covered = {"stretch": (width, height), "pad": (longer, longer), "crop": (shorter, shorter)}[fit]
    placed = cv2.resize(heat, covered, interpolation=cv2.INTER_LINEAR)
    if fit == "pad":
        above, left = (longer - height) // 2, (longer - width) // 2
        placed = placed[above : above + height, left : left + width]
    elif fit == "crop":
        square, placed = placed, np.zeros((height, width), np.float32)
        placed[central_square(height, width)] = square
    warm = 255.0 * colormaps["inferno"](0.35 + 0.6 * placed.clip(0))[..., :3]
    colour = np.where(placed[..., None] > 0, warm, BLUE)
    cover = np.where(placed > 0, WARM * placed, -COLD * placed)[..., None]
    return np.rint((1.0 - cover) * as_rgb(image) + cover * colour).astype(np.uint8)


def legend_strip(height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Draw the colours of all values, from -1 to 1, as they look on a dark image."""
    values = np.linspace(-1, 1, width, dtype=np.float32)
    return overlay(np.full((height, width, 3), 40, np.uint8), values[None].repeat(height, axis=0), "stretch")


def heat_sheet(
    images: Images,
    heats: Sequence[HeatMap],
    captions: Sequence[str],
    fit: str,
    *,
    frames: Sequence[str | None] = (),
    legend: tuple[str, str] | None = None,
) -> PillowImage.Image:
    """Draw rows of images, each above a row of the same images with their heat maps.

    Args:
        images: images of any sizes.
        heats: a heat map for each image.
        captions: captions of the images.
        fit: see `overlay`.
        frames: frames of the images, see `contact_sheet`.
        legend: meaning of negative and of positive values; None draws no legend.
    """
    columns = 8
    tiles: list[Image] = []
    texts: list[str] = []
    edges: list[str | None] = []
    heated = [overlay(image, heat, fit) for image, heat in zip(images, heats, strict=True)]
    frames = frames or [None] * len(images)
    for start in range(0, len(images), columns):
        stop = min(start + columns, len(images))
        gap = columns - (stop - start) if start else 0  # so that both rows of a pair have equal lengths
        blank = [np.zeros((0, 0, 3), dtype=np.uint8)] * gap
        tiles += [*images[start:stop], *blank, *heated[start:stop], *blank]
        texts += [*captions[start:stop], *[""] * (stop - start + 2 * gap)]
        edges += [*frames[start:stop], *[None] * (stop - start + 2 * gap)]
    sheet = contact_sheet(tiles, texts, columns=max(1, min(columns, len(images))), frames=edges)
    return sheet if legend is None else _with_legend(sheet, *legend)


def _with_legend(sheet: PillowImage.Image, negative: str, positive: str) -> PillowImage.Image:
    height, width = LEGEND_SIDES
    font = caption_font()
    left = MARGIN + round(font.getlength(negative)) + MARGIN // 2
    right = left + width + MARGIN // 2
    needed = right + round(font.getlength(positive)) + MARGIN
    taller = PillowImage.new("RGB", (max(sheet.width, needed), sheet.height + height + MARGIN), PAPER)
    taller.paste(sheet)
    taller.paste(PillowImage.fromarray(legend_strip(height, width)), (left, sheet.height))
    draw = ImageDraw.Draw(taller)
    for x, words in ((MARGIN, negative), (right, positive)):
        draw.text((x, sheet.height + height / 2), words, fill=TEXT, font=font, anchor="lm")
    return taller
