"""Speed as ratios measured in one run: scoring against the bare model, and the FixMatch step (README: table 4)."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from bench import DATA, HERE, Row, arguments, table
from torch import Tensor

from anomalymatch import compose, make_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.fixmatch.module import FixMatch
from anomalymatch.algorithms.fixmatch.spec import FixMatchSpec
from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.build import build_embedding
from anomalymatch.data.sources.benchmarks import miniimagenet
from anomalymatch.data.task import Task
from anomalymatch.files import write_text

PLAIN: dict[str, float | str | bool] = {
    "threshold": 0.95,
    "unlabelled_weight": 1.0,
    "ema_decay": 0.99,
    "teacher": "student",
    "schedule": "constant",
    "weight_decay": 7.5e-4,
    "freeze_batch_norm": False,
    "single_forward": True,
}
DEFAULT = PLAIN | {"teacher": "ema", "schedule": "cosine_7_16", "freeze_batch_norm": True, "single_forward": False}


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    task = make_task(miniimagenet(DATA / "miniimagenet", "unused"), anomaly="n03544143")
    rows: list[Row] = []
    for size in (84,) if options.quick else (84, 128):
        rows += scoring(task, size, repeats=1 if options.quick else 3)
    for size in (64,) if options.quick else (128,):
        rows += steps(task, size, repeats=1 if options.quick else 3)
    write_text(HERE / "results" / "speed.csv", to_csv(rows))
    print(table(rows, ("what", "px"), ("per_second", "ratio")))


def scoring(task: Task, size: int, repeats: int) -> list[Row]:
    """Images a second: the model alone on a batch in memory, and the whole way from Parquet JPEGs to features."""
    embedding = _embedding(task, size)
    inference, backbone = embedding.inference, embedding.network(normalised=True).backbone
    batch = inference.batch_size(size)
    forward = inference.prepared(backbone, size=size, count=len(task.source.ids))
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    ids = task.pool[: batch * max(2, 1536 // batch)]

    def bare() -> int:
        for _ in range(len(ids) // batch):
            forward(images)
        return len(ids)

    def streamed() -> int:
        return sum(len(out.ids) for out in inference.run(forward, task.source, ids, size=size))

    rates = alternate({"model alone": bare, "from Parquet JPEGs": streamed}, repeats)
    return [
        {"what": f"scoring, {name}", "px": size, "per_second": rate, "ratio": rate / rates["model alone"]}
        for name, rate in rates.items()
    ]


def steps(task: Task, size: int, repeats: int) -> list[Row]:
    """Training steps a second of 16 + 80 + 80 views: plain, the same layers as two forwards, and the default."""
    variants = {
        "plain: one forward, NCHW, all layers": (PLAIN, None, False, "torch"),
        "two forwards, channels-last, all layers": (PLAIN | {"single_forward": False}, None, True, "torch"),
        "also only the last four stages": (DEFAULT, 4, True, "torch"),
        "default: also the others by OpenVINO": (DEFAULT, 4, True, "openvino"),
        "the last two stages alone": (DEFAULT, 2, True, "openvino"),
    }
    with ExitStack() as apart:
        rates = alternate({name: _step(task, size, apart, *variant) for name, variant in variants.items()}, repeats)
    plain = next(iter(rates.values()))
    return [
        {"what": f"step, {name}", "px": size, "per_second": rate, "ratio": plain / rate} for name, rate in rates.items()
    ]


def _step(
    task: Task,
    size: int,
    apart: ExitStack,
    values: dict[str, float | str | bool],
    groups: int | None,
    channels_last: bool,
    backend: str,
) -> Callable[[], int]:
    embedding = _embedding(task, size, backend)
    network = embedding.network(normalised=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    freeze_lower_groups(network.backbone.body, groups)
    spec = FixMatchSpec(**values)  # type: ignore[arg-type]
    module = FixMatch(network, spec, optimizer=lambda g: torch.optim.SGD(g, lr=1e-4, momentum=0.9), iterations=100)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.memory_format = layout
    module.train()
    module.on_train_start()
    device = torch.device("cpu")
    apart.enter_context(module.frozen_apart(embedding.inference, device=device, batch_size=16, count=100 * 176))
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made

    def views(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(memory_format=layout)

    batch = {"lb": (views(16), torch.arange(16) % 2), "ulb": (views(80), views(80), torch.arange(80))}

    def step() -> int:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
        module.ema.update(network)
        return 1

    return step


def _embedding(task: Task, size: int, backend: str = "auto") -> Embedding:
    words = "model.weights=bundled", f"model.image_size={size}", f"inference.backend={backend}"
    return build_embedding(compose(*words), task)


def alternate(work: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median rate of each, measured in turns so that a slow moment of the machine hits all alike."""
    for call in work.values():
        call()
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            start = time.perf_counter()
            done = call()
            rates[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
