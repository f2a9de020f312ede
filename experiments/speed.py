"""Measure the speed of scoring relative to the model alone, and of FixMatch training steps (README, 4)."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from bench import DATA, Row, interleaved_rates, make_parser, parse_options, table, write_csv
from torch import Tensor

from anomalymatch import compose, make_task
from anomalymatch.algorithms.fixmatch.batches import MixedBatch
from anomalymatch.algorithms.fixmatch.module import FixMatch, FixMatchSpec
from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.frozen_stages import accelerate_frozen_stages
from anomalymatch.build import build_embedding
from anomalymatch.build_images import build
from anomalymatch.data.sources.benchmarks import miniimagenet
from anomalymatch.data.task import Task

PLAIN = build(compose("algorithm=fixmatch_reference").algorithm.learner.loss)
DEFAULT = replace(PLAIN, teacher="ema", schedule="cosine_7_16", freeze_batch_norm=True, single_forward=False)


def main() -> None:
    """Measure all rates and print the table."""
    options = parse_options(make_parser(__doc__))
    task = make_task(miniimagenet(DATA / "miniimagenet", "unused"), anomaly="n03544143")
    rows: list[Row] = []
    for size in (84,) if options.quick else (84, 128):
        rows += scoring_rates(task, size, repeats=1 if options.quick else 3)
    for size in (64,) if options.quick else (128,):
        rows += step_rates(task, size, repeats=1 if options.quick else 3)
    write_csv(options.results / "speed.csv", rows)
    print(table(rows, ("what", "px"), ("per_second", "ratio")))


def scoring_rates(task: Task, size: int, repeats: int) -> list[Row]:
    """Measure images per second: the model alone on a batch in memory, and from Parquet JPEGs to features."""
    embedding = _embedding(task, size)
    inference, backbone = embedding.inference, embedding.network(normalised=True).backbone
    batch = inference.batch_size(size)
    forward = inference.prepare(backbone, size=size, count=len(task.source.ids))
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    ids = task.pool[: batch * max(2, 1536 // batch)]

    def model_alone() -> int:
        for _ in range(len(ids) // batch):
            forward(images)
        return len(ids)

    def from_files() -> int:
        return sum(len(out.ids) for out in inference.run(forward, task.source, ids, size=size))

    rates = interleaved_rates({"model alone": model_alone, "from Parquet JPEGs": from_files}, repeats)
    return [
        {"what": f"scoring, {name}", "px": size, "per_second": rate, "ratio": rate / rates["model alone"]}
        for name, rate in rates.items()
    ]


def step_rates(task: Task, size: int, repeats: int) -> list[Row]:
    """Measure training steps per second on 16 labelled images and 80 unlabelled ones in two views each."""
    variants = {
        "plain: one forward, NCHW, all layers": (PLAIN, None, False, "torch"),
        "two forwards, channels-last, all layers": (replace(PLAIN, single_forward=False), None, True, "torch"),
        "the same, last four stages only": (DEFAULT, 4, True, "torch"),
        "default: the frozen stages by OpenVINO": (DEFAULT, 4, True, "openvino"),
        "default, last two stages only": (DEFAULT, 2, True, "openvino"),
    }
    with ExitStack() as stack:
        work = {name: _make_step(task, size, stack, *variant) for name, variant in variants.items()}
        rates = interleaved_rates(work, repeats)
    plain = next(iter(rates.values()))
    return [
        {"what": f"step, {name}", "px": size, "per_second": rate, "ratio": plain / rate} for name, rate in rates.items()
    ]


def _make_step(
    task: Task,
    size: int,
    stack: ExitStack,
    spec: FixMatchSpec,
    groups: int | None,
    channels_last: bool,
    backend: str,
) -> Callable[[], int]:
    embedding = _embedding(task, size, backend)
    network = embedding.network(normalised=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    freeze_lower_groups(network.backbone.body, groups)
    module = FixMatch(network, spec, optimizer=lambda g: torch.optim.SGD(g, lr=1e-4, momentum=0.9), iterations=100)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.memory_format = layout
    module.train()
    module.on_train_start()
    if spec.freeze_batch_norm:
        backbones = [network.backbone, module.ema.network.backbone]
        options = {"device": torch.device("cpu"), "size": size, "batch_size": 16, "count": 100 * 176}
        stack.enter_context(accelerate_frozen_stages(backbones, embedding.inference, **options))
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made

    def views(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(memory_format=layout)

    batch = MixedBatch(views(16), torch.arange(16) % 2, views(80), views(80), torch.arange(80))

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


if __name__ == "__main__":
    main()
