"""Measure one GPU in about eight minutes, without network: `gpu.py [--quick]` (README, 17).

Forward passes by size, precision and compiler; JPEG decoding on the device; scoring end to end from arrays and from
JPEG; a step of FixMatch; the reference protocol against ours; MSC with a ResNet-152; the re-ranking of a million
images. One JSON line for each result goes to standard output and to `gpu.jsonl` in the folder of the results, as it is
measured; a part whose lines are there is not measured again. Only the packages of anomalymatch are needed, and for the
protocol miniImageNet in the folder `ANOMALYMATCH_DATA`. `--quick` runs on any device.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from bench import DATA, Row, dataset_overrides, make_parser, parse_options
from PIL import Image
from synthetic import NumberedIds, SyntheticSource
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg

from anomalymatch import compose, make_task, run
from anomalymatch.backbones.inference import Inference
from anomalymatch.build import build_embedding
from anomalymatch.scoring.backends import ScoringNetwork
from anomalymatch.terminal import console

SIZES = (64, 84, 128, 150, 224)
GOALS = {"arrays": 40_000, "JPEG": 28_000}
"""Images per second of 150 px, end to end: a hundred million in under an hour."""
BUDGET_S = 480.0
STREAMS = 3
"""Batches on their way at once: one is decoded or copied while another is computed."""


def main() -> None:
    """Measure all parts that are not measured yet, until the time is over."""
    parser = make_parser(__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds after which no further part begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parse_options(parser)
    options.results.mkdir(parents=True, exist_ok=True)
    path, begin = options.results / "gpu.jsonl", time.perf_counter()
    done = {json.loads(line)["part"] for line in path.read_text().splitlines()} if path.exists() else set()
    for name in options.parts:
        if name in done or time.perf_counter() - begin > options.budget:
            console.print(f"{name}: {'is measured already' if name in done else 'no time is left'}", style="dim")
            continue
        lines = []
        for row in PARTS[name](Bench(options)):
            lines.append(json.dumps({"part": name, "device": device_name(), **row}))
            print(lines[-1], flush=True)
        with path.open("a") as file:  # a part that was interrupted is measured again
            file.writelines(f"{line}\n" for line in lines)


def device() -> torch.device:
    """Return the GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    """Wait for all work on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """Sizes of the measurement, and what several parts need."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick = options.quick
        self.model = "test_efficientnet" if self.quick else "tf_efficientnet_lite0"
        self.sizes: Sequence[int] = (32,) if self.quick else SIZES
        self.size = self.sizes[-1] if self.quick else 150
        self.batch, self.seconds = (4, 0.05) if self.quick else (1024, 1.0)
        self.few = ["algorithm.learner.batch.labelled=2"] if self.quick else []  # labelled images in a FixMatch batch

    def network(self, size: int, precision: torch.dtype) -> nn.Module:
        """Build the network that scoring uses, with random weights, on the device."""
        words = [f"model.name={self.model}", "model.weights=none", f"model.image_size={size}"]
        embedding = build_embedding(compose(*words), make_task(SyntheticSource(NumberedIds(4), size)))
        network = embedding.network(normalised=True).eval()
        return ScoringNetwork(network, Inference(), features=False).to(precision)

    def rate(self, work: Callable[[], object], images: int) -> float:
        """Return images per second of `work`, which processes `images`, repeated for about `seconds`."""
        work()
        synchronise()
        begin, times = time.perf_counter(), 0
        while time.perf_counter() - begin < self.seconds:
            work()
            synchronise()
            times += 1
        return images * times / (time.perf_counter() - begin)


def forward(bench: Bench) -> Iterator[Row]:
    """Measure forward passes of images that are on the device."""
    precisions = (torch.float32, torch.bfloat16, torch.float16) if device().type == "cuda" else (torch.float32,)
    for size, precision in product(bench.sizes, precisions):
        network = bench.network(size, precision)
        for batch in (bench.batch // 4, bench.batch):
            images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device())
            for layout in (torch.contiguous_format, torch.channels_last):
                placed = images.to(memory_format=layout)
                rate = bench.rate(lambda network=network, placed=placed: infer(network, placed), batch)
                words = {"precision": str(precision), "layout": str(layout), "batch": batch}
                yield {"what": "forward", "px": size, **words, "per_second": rate}
            if device().type == "cuda":
                replay = captured(network, placed)
                yield {"what": "forward, CUDA graph", "px": size, **words, "per_second": bench.rate(replay, batch)}


def compiled(bench: Bench) -> Iterator[Row]:
    """Measure compiled forward passes, and the seconds of the compilation."""
    precision = torch.bfloat16 if device().type == "cuda" else torch.float32
    for size in bench.sizes[-2:]:
        network = torch.compile(bench.network(size, precision), options={"freezing": True})
        shape = (bench.batch, 3, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device()).to(memory_format=torch.channels_last)
        begin = time.perf_counter()
        infer(network, images)
        synchronise()
        seconds = time.perf_counter() - begin
        rate = bench.rate(lambda network=network, images=images: infer(network, images), bench.batch)
        yield {"what": "forward, compiled", "px": size, "batch": bench.batch, "per_second": rate, "seconds": seconds}


def infer(network: nn.Module, images: Tensor) -> Tensor:
    """Compute one batch."""
    with torch.inference_mode():
        return network(images)


def captured(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a function that replays the forward pass as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        infer(network, images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        network(images)
    return graph.replay


def jpegs(size: int, count: int) -> list[Tensor]:
    """Return different JPEG files of smooth random images, as one finds them in archives."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        files.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    return files


def decode(files: list[Tensor]) -> Tensor:
    """Decode JPEG files of one size on the device, by nvJPEG as TorchVision has it, which TorchCodec will replace."""
    images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device())
    return torch.stack(images)


def decoding(bench: Bench) -> Iterator[Row]:
    """Measure the decoding of JPEG files, whole batches on the device."""
    for size in bench.sizes:
        files = jpegs(size, min(bench.batch, 256))
        rate = bench.rate(lambda files=files: decode(files), len(files))
        yield {"what": "decode JPEG", "px": size, "batch": len(files), "per_second": rate}


def end_to_end(bench: Bench) -> Iterator[Row]:
    """Measure scoring from the memory of the host to logits on the host, with several batches on their way."""
    size, count = bench.size, bench.batch // 2
    precision = torch.bfloat16 if device().type == "cuda" else torch.float32
    network = bench.network(size, precision)
    arrays = [torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8) for _ in range(4)]
    if device().type == "cuda":
        arrays = [array.pin_memory() for array in arrays]
    files = jpegs(size, count)
    sources: dict[str, Callable[[int], Tensor]] = {
        "arrays": lambda number: arrays[number % len(arrays)].to(device(), non_blocking=True),
        "JPEG": lambda number: decode(files),
    }
    batches = 2 * STREAMS if bench.quick else 20 * STREAMS
    for name, load in sources.items():
        rate = bench.rate(lambda load=load: overlapped(network, load, batches), batches * count)
        yield {"what": f"end to end, {name}", "px": size, "batch": count, "per_second": rate, "goal": GOALS[name]}


def overlapped(network: nn.Module, load: Callable[[int], Tensor], batches: int) -> int:
    """Load and score batches in threads with a stream each; return the number of logits that came back."""

    def work(worker: int) -> int:
        stream = torch.cuda.Stream() if device().type == "cuda" else None
        with torch.cuda.stream(stream):
            images = (load(number).to(memory_format=torch.channels_last) for number in range(worker, batches, STREAMS))
            return sum(len(infer(network, batch).cpu()) for batch in images)

    with ThreadPoolExecutor(STREAMS) as threads:
        return sum(threads.map(work, range(STREAMS)))


def trained(words: Sequence[str], folder: Path, steps: int) -> Row:
    """Run one cycle and return its metrics and the seconds of the whole."""
    begin = time.perf_counter()
    row = run(*words, f"trainer.iterations={steps}", "logger=none", folder=folder)[-1]
    return {"steps": steps, "run_s": time.perf_counter() - begin, **{name: row[name] for name in ("ap", "found")}}


def demo(bench: Bench, size: int, *words: str) -> list[str]:
    """Return the words of a run of one cycle on rendered galaxies, with random weights."""
    source = [f"dataset.source.size={size}", "dataset.source.count=600", "dataset.source.rare_fraction=0.3"]
    model = [f"model.name={bench.model}", "model.weights=none", f"model.image_size={size}"]
    return ["dataset=demo", *source, *model, "al.cycles=1", *words]


def fixmatch(bench: Bench) -> Iterator[Row]:
    """Measure a training step of FixMatch at 224 px."""
    size = 32 if bench.quick else 224
    yield from steps(
        "FixMatch", demo(bench, size, "algorithm=fixmatch", *bench.few), (1, 3) if bench.quick else (20, 120), size
    )


def msc(bench: Bench) -> Iterator[Row]:
    """Measure a training step of Mean-Shifted Contrastive loss with the paper's network at 224 px."""
    size = 32 if bench.quick else 224
    words = ["algorithm=msc"] if bench.quick else ["algorithm=msc", "model.name=resnet152"]
    yield from steps("MSC", demo(bench, size, *words), (1, 3) if bench.quick else (10, 60), size)


def steps(what: str, words: Sequence[str], counts: tuple[int, int], size: int) -> Iterator[Row]:
    """Measure a training step by two trainings that differ only in their steps, after one that warms up."""
    with tempfile.TemporaryDirectory() as name:
        folders = {Path(name) / "warm": counts[0], Path(name) / "short": counts[0], Path(name) / "long": counts[1]}
        _, short, long = [float(trained(words, folder, count)["run_s"]) for folder, count in folders.items()]
    step = (long - short) / (counts[1] - counts[0])
    yield {"what": f"{what} step", "px": size, "seconds": step, "run_s": long, "steps": counts[1]}


def protocol(bench: Bench) -> Iterator[Row]:
    """Compare the paper's recipe with ours on one class of miniImageNet: 5 + 495 labels, three cycles, 224 px."""
    if not bench.quick and not (DATA / "miniimagenet").is_dir():
        console.print(f"protocol: left out, since {DATA} has no miniImageNet", style="dim")
        return
    for algorithm, count in (("fixmatch_reference", 100), ("fixmatch", 500)):
        words = ["+experiment=miniimagenet_1pct", *dataset_overrides("miniimagenet"), f"algorithm={algorithm}"]
        if bench.quick:
            words = demo(
                bench, 32, f"algorithm={algorithm}", "al.initial.anomalies=3", "al.initial.normals=9", *bench.few
            )
        with tempfile.TemporaryDirectory() as name:
            row = trained(words, Path(name) / algorithm, 2 if bench.quick else count)
        yield {"what": algorithm, "data": "demo" if bench.quick else "miniImageNet", **row}


def reranking(bench: Bench) -> Iterator[Row]:
    """Measure logits and full order of many images whose features are on the device."""
    count = 10_000 if bench.quick else 1_000_000
    precision = torch.float16 if device().type == "cuda" else torch.float32
    features = torch.randn(count, 256, device=device(), dtype=precision)
    direction = torch.randn(256, device=device(), dtype=precision)

    def rank() -> Tensor:
        return features.mv(direction).argsort(descending=True)[:1000].cpu()

    yield {"what": "re-rank", "images": count, "seconds": count / bench.rate(rank, count)}


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "forward": forward,
    "decoding": decoding,
    "end_to_end": end_to_end,
    "reranking": reranking,
    "fixmatch": fixmatch,
    "msc": msc,
    "compiled": compiled,
    "protocol": protocol,
}
"""Parts, the most important first."""

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
