"""Evidence maps: the log-odds of an image, divided exactly among the places of the image."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from anomalymatch.backbones.ensemble import FeatureEnsemble
from anomalymatch.backbones.network import Backbone, Network
from anomalymatch.backbones.stages import stage_evidence, stage_options, stage_statistics
from anomalymatch.backbones.tokens import pool
from anomalymatch.backbones.tta import crop_box, cut_tiles, restored, shrunk, tta_inputs
from anomalymatch.data.stream import resize, to_tensor
from anomalymatch.errors import ConfigError
from anomalymatch.evaluation.contact_sheet import save_sheet
from anomalymatch.evaluation.heat_maps import heat_sheet, scale_evidence
from anomalymatch.types import Image, Images

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Relative difference up to which pooled features count as the mean over the cells."""
NORM_FLOOR = 1e-12
SHEET_IMAGES = 24
LEGEND = "against an anomaly", "for an anomaly"
Box = tuple[int, int, int]
"""Top, left and side of a square part of an image."""


class Evidence(NamedTuple):
    """Log-odds of one image as a sum: `cells.sum() + rest + intercept`.

    Attributes:
        cells: part of each pixel of the network's square input; positive parts speak for an anomaly.
        rest: part of features without a place, such as the class token of a transformer.
        intercept: intercept of the head.
    """

    cells: Float32[np.ndarray, "s s"]
    rest: float
    intercept: float

    @property
    def logit(self) -> float:
        """Log-odds of the image."""
        return float(self.cells.sum(dtype=np.float64)) + self.rest + self.intercept

    @property
    def local(self) -> Float32[np.ndarray, "s s"]:
        """Log-odds that the image would have if all of it were like this place; their mean is `logit`."""
        return self.cells * np.float32(self.cells.size) + np.float32(self.rest + self.intercept)


@torch.inference_mode()
def locate_evidence(network: Network, image: UInt8[Tensor, "c s s"]) -> Evidence:
    """Divide the log-odds of an image among its places.

    The head is linear, so the log-odds are a sum over features. The mean of a feature map is divided among the cells of
    the map, and the statistics of the stages as in `stage_evidence`. Norms are taken as constants, as in layer-wise
    relevance propagation (Ali et al., ICML 2022). A cell is spread over its rectangle of the image; cells of crops,
    tiles and turned images are mapped back. The largest feature over the tiles belongs to the tile that has it. The
    parts add up exactly, but a cell also sees its surroundings. Of two networks that are averaged, so is the evidence.

    Args:
        network: a network in evaluation mode.
        image: an 8-bit image of `input_size`, on any device.

    Raises:
        ConfigError: if the backbone gives no feature maps.
    """
    if network.second is not None:
        a, b = locate_evidence(network.alone(), image), locate_evidence(network.second, image)
        return Evidence((a.cells + b.cells) / 2, (a.rest + b.rest) / 2, (a.intercept + b.intercept) / 2)
    backbone, head, size = network.backbone, network.head, image.shape[-1]
    pixels = backbone.normalise(image[None].to(backbone.mean.device))
    inputs, boxes = _inputs(backbone, pixels)
    weight, bias = (each[1] - each[0] for each in (head.linear.weight, head.linear.bias))
    views = _views(backbone, inputs)
    pooled = torch.cat([view.pooled for view in views], dim=1)
    statistics = [stage_statistics(view.stages) for view in views if view.stages]
    rows = torch.cat([pooled, *statistics], dim=1)
    last, stages = _input_weights(backbone, rows, weight).split([pooled.shape[1], rows.shape[1] - pooled.shape[1]], 1)
    if head.normalised:
        joined = _join(backbone, rows)[: head.features]
        last = last / joined.norm().clamp_min(NORM_FLOOR)
    rest, evidence = float((pooled * last).sum()), []
    for view, part in zip(views, last.split([view.pooled.shape[1] for view in views], dim=1), strict=True):
        evidence.append(torch.einsum("bchw,bc->bhw", view.cells, part))
        rest -= float(evidence[-1].sum())
        evidence += stage_evidence(view.stages, stages)
    cells = torch.stack([_spread(each, size, boxes, backbone.orientations) for each in evidence]).sum(dim=0)
    return Evidence(cells.cpu().numpy(), rest, float(bias))


def _inputs(backbone: Backbone, pixels: Float[Tensor, "1 c h h"]) -> tuple[Float[Tensor, "n c s s"], list[Box]]:
    """Return all that the body sees of an image, and the place of each in it, for every orientation once."""
    size, tiling = pixels.shape[-1], backbone.tiling
    whole = pixels if tiling is None else shrunk(pixels, tiling.size)
    inputs = list(tta_inputs(whole, backbone.orientations, backbone.crops))
    boxes = [(0, 0, size), *(crop_box(size, crop) for crop in range(backbone.crops))]
    if tiling is not None:
        tiles = torch.stack(list(tta_inputs(cut_tiles(pixels, tiling), backbone.orientations, 0)), dim=1)
        inputs.append(tiles.flatten(0, 1))
        boxes += [(top, left, tiling.size) for top, left in tiling.boxes]
    return torch.cat(inputs), boxes


def _averages(backbone: Backbone, rows: Float[Tensor, "n e"]) -> tuple[Float[Tensor, " e"], Float[Tensor, "t e"]]:
    """Return the features of the whole image, and those of each tile."""
    first = backbone.orientations * (1 + backbone.crops)
    return rows[:first].mean(dim=0), rows[first:].unflatten(0, (-1, backbone.orientations)).mean(dim=1)


def _join(backbone: Backbone, rows: Float[Tensor, "n e"]) -> Float[Tensor, " d"]:
    """Compute the output of the backbone from the features of all inputs."""
    whole, tiles = _averages(backbone, rows)
    parts = [whole] if backbone.tiling is None else [whole, tiles.amax(dim=0), tiles.mean(dim=0)]
    return backbone.join_parts([part[None] for part in parts])[0]


def _input_weights(backbone: Backbone, rows: Float[Tensor, "n e"], weight: Float[Tensor, " d"]) -> Float[Tensor, "n e"]:
    """Divide the weights of a head among all inputs: those of the largest go to the tile that has it."""
    if backbone.tiling is None:
        return (weight / len(rows)).expand_as(rows)
    width, narrow = rows.shape[1], backbone.features // backbone.parts
    last, stages = weight[: backbone.features].view(3, -1), weight[backbone.features :].view(3, width - narrow)
    whole, largest, mean = torch.cat([last, stages], dim=1)
    tiles = _averages(backbone, rows)[1]
    first, count = len(rows) - len(tiles) * backbone.orientations, len(tiles)
    own = mean / count + largest * (torch.arange(count, device=rows.device)[:, None] == tiles.argmax(dim=0))
    shared = own.repeat_interleave(backbone.orientations, dim=0) / backbone.orientations
    return torch.cat([(whole / first).expand(first, -1), shared])


def evidence_map(network: Network, image: Image, fit: str) -> Float32[np.ndarray, "s s"]:
    """Return the `local` evidence of an image of any size.

    Raises:
        ConfigError: if the backbone gives no feature maps.
    """
    return locate_evidence(network, to_tensor([resize(image, network.spec.input_size, fit)])[0]).local


def write_evidence_sheet(
    path: Path, network: Network, images: Images, captions: Sequence[str], fit: str, frames: Sequence[str | None] = ()
) -> None:
    """Write a sheet of the first `SHEET_IMAGES` images above the same images with heat maps of their evidence.

    If the backbone gives no feature maps, there is no sheet, and the log says why.

    Args:
        path: the PNG file.
        network: a network in evaluation mode.
        images: images of any sizes, most anomalous first.
        captions: captions of the images, see `contact_sheet`.
        fit: how images become square, see `data.stream.resize`.
        frames: frames of the images, see `contact_sheet`.
    """
    images, captions, frames = images[:SHEET_IMAGES], captions[:SHEET_IMAGES], frames[:SHEET_IMAGES]
    try:
        heats = [scale_evidence(evidence_map(network, image, fit)) for image in images]
    except ConfigError as error:
        logger.info("%s is not written: %s", path.name, error)
        return
    save_sheet(heat_sheet(images, heats, captions, fit, frames=frames, legend=LEGEND), path)


class _View(NamedTuple):
    """Features of a model for all inputs, the cells that they are the sum of, and the maps of its stages."""

    pooled: Float[Tensor, "b d"]
    cells: Float[Tensor, "b d _ _"]
    stages: list[Float[Tensor, "b _ _ _"]]


def _views(backbone: Backbone, inputs: Float[Tensor, "b c s s"]) -> list[_View]:
    """Return the view of the model, or those of an ensemble's models."""
    body = backbone.body
    if not isinstance(body, FeatureEnsemble):
        return [_view(body, inputs, stage_options(body) if backbone.stage_features else {})]
    views = [_view(model, body.normalise(inputs, i), {}) for i, model in enumerate(body.models)]
    norms = [view.pooled.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR) for view in views]
    return [_View(v.pooled / norm, v.cells / norm[..., None, None], []) for v, norm in zip(views, norms, strict=True)]


def _view(body: nn.Module, inputs: Float[Tensor, "b c s s"], options: dict[str, Any]) -> _View:
    if not hasattr(body, "forward_intermediates"):
        raise ConfigError("this backbone gives no feature maps, so the places of its evidence are unknown")
    model = cast(Any, body)
    final, stages = model.forward_intermediates(inputs, **(options or {"indices": 1}))
    pooled = pool(body, final)
    return _View(pooled, _cells(model, final, pooled), stages if options else [])


def _cells(model: Any, final: Float[Tensor, "b ..."], pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b d _ _"]:
    """Return vectors whose sum over the cells is `pooled`, up to a constant; zeros where it is not a mean over cells.

    The features of a class token come first, and have no cells.
    """
    maps = _as_map(model, final)
    cells, constant = maps / maps[0, 0].numel(), torch.zeros(())
    norm = getattr(getattr(model, "head", None), "norm", None) or getattr(model, "fc_norm", None)
    if isinstance(norm, nn.LayerNorm):  # after the mean, as in a ConvNeXt
        deviation = (cells.sum((2, 3)).var(1, correction=0) + norm.eps).sqrt()
        cells = (cells - cells.mean(1, keepdim=True)) / deviation[:, None, None, None] * norm.weight[:, None, None]
        constant = norm.bias
    width = cells.shape[1]
    found, own = cells.sum((2, 3)) + constant, pooled[:, -width:]
    if found.shape != own.shape or bool((found - own).norm() > TOLERANCE * own.norm()):
        return torch.zeros_like(pooled)[..., None, None]
    placeless = cells.new_zeros(len(cells), pooled.shape[1] - width, *cells.shape[2:])
    return torch.cat([placeless, cells], dim=1)


def _as_map(model: Any, final: Float[Tensor, "b ..."]) -> Float[Tensor, "b d _ _"]:
    """Return the last features of a model, channels first; of tokens, those of the patches."""
    if final.ndim == 3:
        patches = final[:, getattr(model, "num_prefix_tokens", 0) :]
        return patches.transpose(1, 2).unflatten(2, (math.isqrt(patches.shape[1]), -1))
    return final.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else final


def _spread(
    maps: Float[Tensor, "b h w"], size: int, boxes: Sequence[Box], orientations: int
) -> Float[Tensor, "{size} {size}"]:
    """Add up the maps of all inputs (see `_inputs`) on the pixels of the image; the sum stays the same."""
    total = maps.new_zeros(size, size)
    for (top, left, side), own in zip(boxes, maps.split(orientations), strict=True):
        upright = torch.stack([restored(each[None], i)[0] for i, each in enumerate(own)]).sum(dim=0)
        rows = _overlaps(upright.shape[0], top, side, size).to(maps)
        columns = _overlaps(upright.shape[1], left, side, size).to(maps)
        total += rows @ upright @ columns.T
    return total


def _overlaps(cells: int, start: int, length: int, size: int) -> Float[Tensor, "{size} {cells}"]:
    """Return the share of each cell that lies on each pixel; equal cells cover `length` pixels from `start` on."""
    edges = start + length * torch.arange(cells + 1, dtype=torch.float64) / cells
    pixels = torch.arange(size, dtype=torch.float64)[:, None]
    covered = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return covered.clamp_min(0) * cells / length
