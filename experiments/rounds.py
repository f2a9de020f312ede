"""Measure a round of the loop with the probe on up to ten million images with synthetic features (README, 19).

A round asks the oracle, fits, ranks, measures, and writes scores and report. `--against SRC` measures the package in
another folder `src`, too, in turn. `--neighbours` measures rounds with `al.candidates=neighbours`, too, after the index
was built in a process of its own.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from bench import Row, group_by, make_parser, markdown, parse_options, write_csv
from omegaconf import DictConfig, OmegaConf
from synthetic import PlantedFeatures, SyntheticSource, image_ids

from anomalymatch import compose
from anomalymatch.active import loop as loop_module
from anomalymatch.active.loop import ActiveLoop
from anomalymatch.active.report import RunReport
from anomalymatch.active.run_folder import RunFolder
from anomalymatch.active.tracking import Tracker
from anomalymatch.algorithms.probe.learner import ProbeLearner
from anomalymatch.build import build_embedding, build_loop
from anomalymatch.cache import Cache
from anomalymatch.data.task import Task
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console

WIDE_IMAGES = 2_000_000
"""Images up to which the features are those of the shipped backbone, 2,848 columns; those of more fill the disk."""
NARROW = ("model.name=test_efficientnet", "model.weights=none", "model.stages=false")
"""Backbone with 256 columns."""
CYCLES = 3
SIZES = (100_000, 1_000_000, 10_000_000)
PARTS: dict[str, list[tuple[Any, str]]] = {
    "query": [(ActiveLoop, "_labels"), (ActiveLoop, "_pool")],
    "search for neighbours": [(ActiveLoop, "_candidates")],
    "fit": [(ProbeLearner, "fit")],
    "rank": [(ProbeLearner, "rank")],
    "metrics": [(loop_module, "cycle_metrics"), (ActiveLoop, "_left")],
    "scores.parquet": [(Ranking, "write")],
    "contact sheets": [(loop_module, "write_sheets")],
    "scores.csv": [(Ranking, "write_csv")],
    "report": [(RunReport, "write")],
    "other files": [(ActiveLoop, "_cycle")],
}
"""Functions of the loop by part; the time of a function is without that of the functions in it."""


def main() -> None:
    """Measure all sizes and print a table for each."""
    parser = make_parser(__doc__, quick="5,000 images")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES)
    parser.add_argument("--against", type=Path, help="folder src of another version")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each version")
    parser.add_argument("--cycles", type=int, default=CYCLES, help="cycles of a run; the first is not measured")
    parser.add_argument("--every", type=int, nargs="+", default=[5], help="every so many-th image is held out")
    parser.add_argument("--neighbours", action="store_true", help="rounds with al.candidates=neighbours, too")
    parser.add_argument("--narrow", action="store_true", help="256 columns for any number of images")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--index", action="store_true", help=argparse.SUPPRESS)
    options = parse_options(parser)
    if options.cache is not None:
        print(json.dumps(build_index(options) if options.index else measure(options)))
        return
    rows: list[Row] = []
    here = Path(loop_module.__file__).parents[2]
    versions = {"now": here} if options.against is None else {"before": options.against.resolve(), "now": here}
    versions |= {"neighbours": here} if options.neighbours else {}
    options.runs.mkdir(parents=True, exist_ok=True)
    for images in (5_000,) if options.quick else options.images:
        with tempfile.TemporaryDirectory(dir=options.runs) as name:
            console.print(f"rounds: {images:,} images", highlight=False)
            width = write_features(Path(name), images, narrow=options.narrow)
            words = ["--images", str(images), "--cycles", str(options.cycles), "--cache", name]
            words += ["--narrow"] if options.narrow else []
            if options.neighbours:
                print(json.dumps(run_child(here, *words, "--index")), flush=True)
            for every in options.every:
                for repeat, (version, source) in product(range(options.repeats), versions.items()):
                    known = {"images": images, "width": width, "every": every, "version": version, "repeat": repeat}
                    mode = ["--neighbours"] if version == "neighbours" else []
                    rows += [known | row for row in run_child(source, *words, "--every", str(every), *mode)]
                some = [row for row in rows if (row["images"], row["every"]) == (images, every)]
                print(f"\nOne image in {every} is held out:\n\n{show(some, list(versions))}", flush=True)
    write_csv(options.results / "rounds.csv", rows)


def settings(
    cache: Path, images: int, *, narrow: bool = False, every: int = 5
) -> tuple[DictConfig, Task, PlantedFeatures]:
    """Compose the configuration of a run, and define its images, of which every fifth, or another part, is held out."""
    narrow = narrow or images > WIDE_IMAGES or images < SIZES[0]
    small = NARROW if narrow else ("model.weights=bundled",)
    config = compose(
        "dataset=demo", "algorithm=probe", "oracle=top_k", "logger=none", *small,
        "al.initial.normals=195", f"data.cache_dir={cache}",
    )  # fmt: skip
    ids = image_ids(images)
    backbone = build_embedding(config, Task(SyntheticSource(ids[:1], 64), ids[:1], [], None))._built[1]
    planted = PlantedFeatures(images, backbone.width, backbone.features, share=0.01 if images < SIZES[0] else 0.001)
    pool = [id_ for i, id_ in enumerate(ids) if i % every]
    return config, Task(SyntheticSource(ids, 64), pool, ids[::every], frozenset(ids[i] for i in planted.rare)), planted


def write_features(cache: Path, images: int, *, narrow: bool = False) -> int:
    """Write features where the run looks for them; return the number of columns."""
    config, task, planted = settings(cache, images, narrow=narrow)
    store = Cache(build_embedding(config, task).features_folder)
    for k, shard in enumerate(planted.shards()):
        start = k * planted.SHARD
        info = {"ids": task.source.ids[start : start + planted.SHARD], "rejects": []}
        store.write(f"{start:09d}", {"rows": shard}, info)
    return planted.width


def run_child(source: Path, *options: str) -> Any:
    """Run this script with the package in the folder `source` in a process of its own, and return what it prints."""
    path = os.pathsep.join([str(source), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    words = [sys.executable, __file__, *options]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    return json.loads(done.stdout)


class Stopwatch:
    """Wall time and processor time of functions, each without that of the measured functions that it calls."""

    def __init__(self) -> None:
        self.spent: dict[str, np.ndarray] = {}
        self._inner = [np.zeros(2)]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Measure the function `name` of a class or module as `part`."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(np.zeros(2))
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                total = now() - start
                self.spent[part] = self.spent.get(part, np.zeros(2)) + total - self._inner.pop()
                self._inner[-1] += total

        setattr(owner, name, measured)


def now() -> np.ndarray:
    """Return wall time and processor time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def build_index(options: argparse.Namespace) -> Row:
    """Build the index of neighbours; return the seconds that this takes, its bytes, and the memory of this process."""
    from anomalymatch.backbones.neighbours import open_search

    config, task, _ = settings(options.cache, options.images[0], narrow=options.narrow, every=options.every[0])
    embedding = build_embedding(config, task)
    features, folder, seconds = embedding.features, embedding.features_folder / "neighbours", []
    for _ in range(2):
        begin = time.perf_counter()
        open_search(features, folder)
        seconds.append(time.perf_counter() - begin)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"index, s": seconds[0], "open it, s": seconds[1], "GB": size / 1e9, "peak memory, GiB": peak}


def measure(options: argparse.Namespace) -> list[Row]:
    """Run all cycles; return the seconds by part and cycle, from the second on, which are complete rounds."""
    cache, cycles = options.cache, options.cycles
    config, task, _ = settings(cache, options.images[0], narrow=options.narrow, every=options.every[0])
    config.al.cycles = cycles
    if options.neighbours:  # the last cycle, which ranks all images, is not measured
        config.al.update(cycles=cycles + 1, candidates="neighbours")
    watch = Stopwatch()
    for part, functions in PARTS.items():
        for owner, name in functions:
            if hasattr(owner, name):  # another version lacks some
                watch.watch(owner, name, part)
    loop, run = build_loop(config, task), cache / "run"
    begin = now()
    loop.learner.embedding.scaling  # noqa: B018 (reads the features and checks their checksums)
    rows: list[Row] = [{"cycle": 0, "part": "start", "wall": (now() - begin)[0], "processor": (now() - begin)[1]}]
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))

    class Rounds(Tracker):
        def log_cycle(self, cycle: int, *args: Any) -> None:
            """Take the times of the cycle; its own function is still running."""
            watch.spent.setdefault("other files", np.zeros(2))
            done.append(dict(watch.spent))

    done: list[dict[str, np.ndarray]] = []
    with closing(RunFolder(run)) as folder:
        loop.run(folder, Rounds(run, {}, "rounds", None))
    if not options.neighbours:
        done.append(watch.spent)
    found = [json.loads((run / f"cycles/{c:02d}/metrics.json").read_text())["found"] for c in range(1, cycles + 1)]
    for cycle in range(2, cycles + 1):
        for part in PARTS:
            before, after = (done[at].get(part, np.zeros(2)) for at in (cycle - 2, cycle - 1))
            if part == "other files":  # counted when the function returns, after `log_cycle`
                before, after = (done[at].get(part, np.zeros(2)) for at in (cycle - 1, cycle))
            wall, processor = (after - before).tolist()
            rows.append({"cycle": cycle, "part": part, "wall": wall, "processor": processor, "found": found[-1]})
    return rows


def show(rows: list[Row], versions: list[str]) -> str:
    """Format the median seconds of a round by part, for each version, and the ratio of the first to the last."""
    lines = []
    for (part,), members in group_by(rows, ("part",)).items():
        lines.append([part, *_cells(members, versions)])
    rounds = group_by([row for row in rows if row["part"] != "start"], ("version", "cycle", "repeat"))
    totals: list[Row] = [
        {"version": key[0], **{kind: sum(float(row[kind]) for row in some) for kind in ("wall", "processor")}}
        for key, some in rounds.items()
    ]
    lines.append(["a round", *_cells(totals, versions)])
    head = [f"{rows[0]['images']:,} images, {rows[0]['width']} columns"]
    for version in versions:
        head += [f"{version}, s", f"{version}, s of processor"]
    return markdown([*head, *(["ratio of processor"] if len(versions) > 1 else [])], lines)


def _cells(rows: list[Row], versions: list[str]) -> list[str]:
    medians = [
        [statistics.median(float(r[kind]) for r in rows if r["version"] == v) for kind in ("wall", "processor")]
        for v in versions
    ]
    cells = [f"{value:.2f}" for pair in medians for value in pair]
    return [*cells, *([f"{medians[0][1] / medians[-1][1]:.1f}"] if len(versions) > 1 else [])]


if __name__ == "__main__":
    main()
