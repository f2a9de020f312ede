"""Measure scoring throughput by format and backend, memory with ten million ids, and cost by job size (README, 5)."""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr
from astropy.io import fits
from bench import DATA, Row, interleaved_rates, make_parser, parse_options, table, write_csv
from PIL import Image
from synthetic import NumberedIds, SyntheticSource

from anomalymatch import compose, make_task
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network
from anomalymatch.build import build_embedding
from anomalymatch.data.convert import convert
from anomalymatch.data.open import open_path
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.benchmarks import galaxyzoo1
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.stream import resize, stream
from anomalymatch.errors import ConfigError
from anomalymatch.progress import progress
from anomalymatch.scoring.backends import Scorer, find_batch_size, make_scorer
from anomalymatch.scoring.finish import TopK, finish
from anomalymatch.scoring.job import score_parts
from anomalymatch.scoring.parts import Manifest, PartFolder, open_manifest

BACKENDS = ("torch", "compile", "openvino")
MEASURES = ("per_second", "ratio")
USUAL = ("JPEG folder", "Parquet", "npy", "FITS folder")
PIXELS = 8_000_000
"""Pixels of the images that are scored at each of `--sizes`."""


def main() -> None:
    """Measure and print everything; with `--memory N` or `--start FOLDER`, only that, in this process."""
    if len(sys.argv) == 3 and sys.argv[1] == "--memory":
        print(peak_memory(int(sys.argv[2])))
        return
    if len(sys.argv) == 3 and sys.argv[1] == "--start":
        print(*opening_seconds(sys.argv[2]))
        return
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="only the throughput at these sizes, by OpenVINO")
    options = parse_options(parser)
    quick, rows = options.quick, list[Row]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sizes:
            for size in options.sizes:
                count = 64 if quick else round(PIXELS / size**2)
                rows += throughput(folder / str(size), size, count, ("openvino",), USUAL, repeats=1 if quick else 5)
            write_csv(options.results / "throughput_sizes.csv", rows)
            print(table(rows, ("what", "px"), MEASURES))
            return
        stages: list[Callable[[], list[Row]]] = [
            lambda: throughput(folder / "84", 84, 128 if quick else 4096, repeats=1 if quick else 2),
            lambda: start_up(folder, 1_000 if quick else 1_000_000),
            lambda: memory(100_000 if quick else 10_000_000),
            lambda: growth((1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_000_000)),
            # Without torch.compile, which needs more than four minutes at this size.
            *([] if quick else [lambda: throughput(folder / "150", 150, 2048, ("torch", "openvino"))]),
        ]
        for stage in stages:
            rows += stage()
            write_csv(options.results / "throughput.csv", rows)
            print(table(rows, ("what", "px"), MEASURES), flush=True)


def throughput(
    folder: Path,
    size: int,
    count: int,
    names: Sequence[str] = BACKENDS,
    formats: Sequence[str] | None = None,
    repeats: int = 2,
) -> list[Row]:
    """Measure images per second: each backend alone; reading, decoding and scoring each format; a plain loop."""
    original = galaxyzoo1(DATA / "galaxyzoo1", "unused")
    network = (
        build_embedding(
            compose("model.weights=bundled", f"model.image_size={size}"), make_task(original, anomaly="merger")
        )
        .network(normalised=True)
        .eval()
    )
    inference = Inference()
    batch = find_batch_size(network, inference)
    backends = {name: scorer for name in names if (scorer := _scorer(network, inference, name, batch)) is not None}
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    forward = interleaved_rates({name: _forward(scorer, images, 4 * batch) for name, scorer in backends.items()}, 3)
    best = max(forward, key=forward.__getitem__)
    rows: list[Row] = [_row(f"forward, {name}", size, rate, rate / forward[best]) for name, rate in forward.items()]
    sources = write_formats(folder, original, original.ids[:count], size)
    work = {
        "plain loop": _plain_loop(network, folder / "folder", size, batch),
        "forward": _forward(backends[best], images, count),
    }
    for name, source in sources.items():
        if formats is not None and name not in formats:
            continue
        if source.encoded:
            work[f"read, {name}"] = _reading(source)
        work[f"decode, {name}"] = _decoding(source, size, batch)
        work[f"end to end, {name}"] = _end_to_end(source, backends[best], network, size, batch)
    rates = interleaved_rates(work, repeats)
    plain, full = rates.pop("plain loop"), rates.pop("forward")
    rows.append(_row(f"forward, {best}, between the following", size, full, 1.0))
    rows.append(_row("plain loop: PIL, fp32, NCHW", size, plain, plain / full))
    for what, rate in rates.items():
        step, _, name = what.partition(", ")
        limit = min(rates[f"decode, {name}"], full) if step == "end to end" else full
        rows.append(_row(what, size, rate, rate / limit))
    times = max(rate for what, rate in rates.items() if what.startswith("end to end")) / plain
    return [*rows, _row("best end to end against the plain loop", size, float("nan"), times)]


def _scorer(network: Network, inference: Inference, name: str, batch: int) -> Scorer | None:
    try:
        return make_scorer(network, inference, backend=name, count=1, batch_size=batch, features=False)[1]
    except ConfigError as error:
        print(f"left out: {error}", file=sys.stderr)
        return None


def _forward(scorer: Scorer, images: torch.Tensor, count: int) -> Callable[[], int]:
    """Return a function that scores `count` images from memory, as many as the others: a machine slows under load."""

    def run() -> int:
        times = -(-count // len(images))
        for _ in range(times):
            scorer(images)
        return times * len(images)

    return run


def write_formats(folder: Path, original: ImageSource, ids: Sequence[str], size: int) -> dict[str, ImageSource]:
    """Write the same images, `size` pixels a side, in every format and open them."""
    stack = np.stack(images := [resize(image, size, "stretch") for image in original.read(ids)])
    (folder / "folder").mkdir(parents=True)
    (folder / "fits").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "folder" / f"{i:06d}.jpg", quality=92)
        fits.writeto(folder / "fits" / f"{i:06d}.fits", image.transpose(2, 0, 1))
    files = open_path(folder / "folder", cache_dir=folder)
    convert(files, folder / "parquet", encoding="keep")
    _pack(folder)
    np.save(folder / "array.npy", stack)
    chunks = (min(64, len(stack)), *stack.shape[1:])
    with h5py.File(folder / "array.h5", "w") as file:
        file.create_dataset("images", data=stack, chunks=chunks)
    zarr.create_array(str(folder / "array.zarr"), data=stack, chunks=chunks)
    names = {"JPEG folder": "folder", "zip": "images.zip", "WebDataset": "images.tar", "Parquet": "parquet"}
    names |= {"npy": "array.npy", "HDF5": "array.h5", "Zarr": "array.zarr", "FITS folder": "fits"}
    return {name: open_path(folder / path, cache_dir=folder) for name, path in names.items()}


def _pack(folder: Path) -> None:
    files = sorted((folder / "folder").iterdir())
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in files:
            archive.write(file, file.name)
    with tarfile.open(folder / "images.tar", "w") as archive:
        for file in files:
            archive.add(file, file.name)


def _reading(source: ImageSource) -> Callable[[], int]:
    return lambda: sum(len(source.raw_bytes(id_)) > 0 for id_ in source.ids)


def _decoding(source: ImageSource, size: int, batch: int) -> Callable[[], int]:
    workers = os.cpu_count() or 1
    return lambda: sum(len(b.ids) for b in stream(source, source.ids, size=size, batch_size=batch, workers=workers))


def _end_to_end(source: ImageSource, scorer: Scorer, network: Network, size: int, batch: int) -> Callable[[], int]:
    def run() -> int:
        with tempfile.TemporaryDirectory() as out, progress("Scoring", len(source.ids)) as advance:
            manifest = Manifest("run", source.name, "", len(source.ids), 4096, batch, "", "", "cpu", False)
            parts = range(manifest.parts)
            top = TopK(100)
            score_parts(
                source, scorer, PartFolder(Path(out), manifest), parts, size=size, width=0, workers=2, top=top,
                advance=advance,
            )  # fmt: skip
        return len(source.ids)

    return run


def _plain_loop(network: Network, folder: Path, size: int, batch: int) -> Callable[[], int]:
    """Return the naive loop: open, resize and stack files in one thread; single precision, default layout, softmax.

    These are the steps of the public code of esa/AnomalyMatch 1.3 for a batch, with PIL in place of libjpeg-turbo.
    """
    files = sorted(folder.iterdir())[:256]
    plain = network.to(memory_format=torch.contiguous_format)

    def run() -> int:
        for start in range(0, len(files), batch):
            chunk = [
                np.asarray(Image.open(file).convert("RGB").resize((size, size)))
                for file in files[start : start + batch]
            ]
            with torch.no_grad():
                logits = plain(torch.from_numpy(np.stack(chunk).transpose(0, 3, 1, 2).astype(np.float32).copy()))
                torch.softmax(logits, dim=-1)
        return len(files)

    return run


def _job(count: int, scorer: Scorer, out: Path, size: int) -> None:
    """Run a whole scoring job, including its tables."""
    source = SyntheticSource(NumberedIds(count), size)
    manifest = Manifest("run", "", "", count, 16_384, 512, "", "", "cpu", False)
    open_manifest(out, manifest)
    folder, top = PartFolder(out, manifest), TopK(1000)
    with progress("Scoring", count) as advance:
        score_parts(
            source, scorer, folder, range(manifest.parts), size=size, width=0, workers=2, top=top, advance=advance
        )
    finish(folder, source, 1000, csv=True)


def growth(counts: Sequence[int]) -> list[Row]:
    """Measure images per second of whole jobs by their size, with the smallest network."""
    embedding = build_embedding(
        compose("model.name=test_efficientnet", "model.weights=none", "model.image_size=16"),
        make_task(SyntheticSource(NumberedIds(4), 16)),
    )
    _, scorer = make_scorer(
        embedding.network(normalised=True).eval(), Inference(), backend="torch", count=1, batch_size=512, features=False
    )
    rates = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            _job(count, scorer, Path(out), 16)
            rates[count] = count / (time.perf_counter() - start)
    return [_row(f"growth, {count:,} images", 16, rate, rate / rates[counts[-1]]) for count, rate in rates.items()]


def peak_memory(count: int) -> float:
    """Run a job of `count` images without a network and return the peak memory of this process in MB."""
    rng = np.random.default_rng(0)

    def scorer(images: torch.Tensor) -> np.ndarray:
        return rng.normal(size=(len(images), 1)).astype(np.float32)

    with tempfile.TemporaryDirectory() as out:
        _job(count, scorer, Path(out), 16)
    # ru_maxrss would include the memory of the parent process.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def memory(count: int) -> list[Row]:
    """Measure the peak memory of a job in its own process, relative to a job of a thousand images."""
    peaks = {n: float(_call("--memory", str(n))) for n in (1_000, count)}
    return [_row(f"peak memory in MB, {n:,} ids", 16, peak, peak / peaks[1_000]) for n, peak in peaks.items()]


def start_up(folder: Path, count: int) -> list[Row]:
    """Measure the seconds until a folder of `count` files is open."""
    for i in range(count):
        if i % 1000 == 0:
            (folder / "many" / f"{i // 1000:04d}").mkdir(parents=True)
        (folder / "many" / f"{i // 1000:04d}" / f"{i % 1000:03d}.jpg").touch()
    times = zip(("folder", "auto"), _call("--start", str(folder / "many")).split(), strict=True)
    return [_row(f"seconds to open {count:,} files, dataset={name}", 0, float(t), float("nan")) for name, t in times]


def opening_seconds(folder: str) -> list[float]:
    """Return the seconds until a folder is open as dataset=folder and as dataset=auto."""
    times = []
    for open_ in (FolderSource, partial(open_path, cache_dir=tempfile.gettempdir())):
        started = time.perf_counter()
        open_(folder)
        times.append(time.perf_counter() - started)
    return times


def _call(*words: str) -> str:
    return subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True).stdout.strip()


def _row(what: str, size: int, rate: float, ratio: float) -> Row:
    return {"what": what, "px": size, "per_second": rate, "ratio": ratio}


if __name__ == "__main__":
    main()
