"""Compare int8 with higher precision, by size and layer by layer, and what it costs a search (README, 18)."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from adaptation import measure
from bench import (
    DATA,
    NO_CROPS,
    Row,
    format_interval,
    interleaved_rates,
    make_parser,
    markdown,
    parse_options,
    write_csv,
)
from recipes import PROBLEMS

from anomalymatch import initial_labels, make_learner, open_task
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.backbones import int8
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.backbones.openvino import compiled_forward, openvino_model
from anomalymatch.data.source import ImageSource
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.scoring.backends import ScoringNetwork

TRAINED, LABELS = 150, {"anomalies": 15, "normals": 200, "seed": 0}
COMPARED = 1024


def main() -> None:
    """Measure the parts and print a table for each."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parse_options(parser)
    for name in options.parts:
        rows = PARTS[name](options.quick)
        write_csv(options.results / f"int8_{name}.csv", rows)
        print(markdown(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]), flush=True)


def sizes(quick: bool) -> list[Row]:
    """Compare bf16 and int8 with fp32 by image size: speed in turns, and the scores of a probe fitted at 150 px."""
    source, network = _trained("merger", quick)
    rows: list[Row] = []
    for size in (32,) if quick else (64, 84, 128, 150, 224):
        module, batch = _module(network), Inference().batch_size(size)
        model = openvino_model(module, source.channels, size, batch)
        images = int8.sample_images(source, size)
        first, others = images[: int8.CALIBRATION_IMAGES], images[int8.CALIBRATION_IMAGES :][:COMPARED]
        small = int8.quantised_model(model, int8.full_batches(first, batch))
        exact, half = compiled_forward(model, batch, bf16=False), compiled_forward(model, batch, bf16=True)
        rests = {"fp32": False, "bf16": True}
        mixed = {f"int8, the rest {name}": compiled_forward(small, batch, bf16=bf16) for name, bf16 in rests.items()}
        rows += _compared(exact, {"bf16": half, **mixed}, others, size=size)
    return rows


def layers(quick: bool) -> list[Row]:
    """Compare which layers are quantised, and how, at 150 px."""
    import nncf

    source, network = _trained("merger", quick)
    size = 32 if quick else TRAINED
    module, batch = _module(network), Inference().batch_size(size)
    model = openvino_model(module, source.channels, size, batch)
    images = int8.sample_images(source, size)
    first, others = images[: int8.CALIBRATION_IMAGES], images[int8.CALIBRATION_IMAGES :][:COMPARED]
    batches = nncf.Dataset(int8.full_batches(first, batch))
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ordered_ops()}
    names = [name for name, kind in kinds.items() if kind in int8.LAYERS]
    depthwise = {name for name in names if kinds[name] == "GroupConvolution"}
    smooth = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=0.5, matmul=0.5)
    )
    slow = {"fast_bias_correction": False}
    pointwise = [name for name in names[1:-1] if name not in depthwise]
    chosen: dict[str, tuple[list[str], dict[str, Any]]] = {
        "all": (names, {}),
        "all but the first and the last": (names[1:-1], {}),
        "the same, slow bias correction": (names[1:-1], slow),
        "pointwise": (pointwise, {}),
        "pointwise, slow bias correction": (pointwise, slow),
        "the same, asymmetric": (pointwise, slow | {"preset": nncf.QuantizationPreset.MIXED}),
        "the same, SmoothQuant": (pointwise, slow | {"advanced_parameters": smooth}),
        "pointwise of the last half, slow": (pointwise[len(pointwise) // 2 :], slow),
    }
    exact, rows = compiled_forward(model, batch, bf16=False), list[Row]()
    for name, (wanted, changes) in chosen.items():
        scope = nncf.IgnoredScope(names=[each for each in names if each not in wanted])
        small = nncf.quantize(model, batches, subset_size=len(images), ignored_scope=scope, **changes)
        rows += _compared(exact, {name: compiled_forward(small, batch, bf16=False)}, others, size=size)
    return rows


def search(quick: bool) -> list[Row]:
    """Search with 200 labels by the probe on features of each precision: what rounding costs in anomalies found."""
    rows: list[Row] = []
    for name in ("demo lenses",) if quick else ("merger", "don't know"):
        for precision in ("fp32", "bf16", "int8"):
            words = ["model.weights=bundled", "model.crops=0", f"inference.precision={precision}"]
            draws = [measure(PROBLEMS[name], draw, words)[0] for draw in range(1 if quick else 10)]
            means = {key: format_interval(mean_interval([float(row[key]) for row in draws])) for key in draws[0]}
            rows.append({"anomaly": name, "precision": precision, "draws": len(draws), **means})
    return rows


def _fitted(anomaly: str, size: int, crops: int) -> tuple[Any, Any]:
    words = [f"data.root={DATA / 'galaxyzoo1'}", f"dataset.anomaly={anomaly}", f"model.image_size={size}",
             "model.weights=bundled", *NO_CROPS, f"model.crops={crops}"]  # fmt: skip
    task = open_task("galaxyzoo1", *words)
    return task, make_learner("probe", task, *words).fit(initial_labels(task, **LABELS))


def _trained(anomaly: str, quick: bool) -> tuple[ImageSource, Network]:
    task, learner = _fitted(anomaly, 32 if quick else TRAINED, 0)
    with TemporaryDirectory() as folder:
        learner.save(Path(folder))
        return task.source, load_network(Path(folder) / WEIGHTS)


def _module(network: Network) -> ScoringNetwork:
    return ScoringNetwork(copy.deepcopy(network), Inference("cpu", "fp32"), features=False)


def _compared(exact: Callable[..., Any], others: dict[str, Any], images: torch.Tensor, *, size: int) -> list[Row]:
    expected, rows = exact(images), list[Row]()
    few = images[: 2 * Inference().batch_size(size)]
    rates = interleaved_rates({name: lambda f=f: len(f(few)) for name, f in {"fp32": exact, **others}.items()}, 5)
    for name, forward in others.items():
        spearman, overlap = int8.agreement(expected, forward(images))
        rows.append({"px": size, "what": name, "speed": rates[name] / rates["fp32"], "Spearman": spearman,
                     "top 1 %": overlap})  # fmt: skip
    return rows


def _cell(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PARTS = {"sizes": sizes, "layers": layers, "search": search}


if __name__ == "__main__":
    main()
