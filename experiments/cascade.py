"""Measure cascades: what a cheap first look keeps, what a job with one costs, and a fine-tuned student (README, 18)."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from bench import DATA, NO_CROPS, Row, make_parser, markdown, parse_options, write_csv
from jaxtyping import Float64, UInt8
from scipy.stats import spearmanr
from torch import Tensor

from anomalymatch import initial_labels, make_learner, open_task, score
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import Network, build_backbone
from anomalymatch.backbones.tta import reoriented
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import stream
from anomalymatch.scoring import job
from anomalymatch.scoring.cascade import SAMPLE_DIVISOR, FirstLook, Look, first_sides, look_at
from anomalymatch.scoring.first_look import MIN_TOP, choose_threshold, fit_student
from anomalymatch.scoring.parts import Manifest

TRAINED, LABELS, DRAWS = 150, {"anomalies": 15, "normals": 200, "seed": 0}, 4
TAUGHT, EPOCHS, BATCH = 2000, 30, 64


class Problem(NamedTuple):
    """Rare class of a data set, and the full look: with how many crops."""

    dataset: str
    anomaly: str
    crops: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.anomaly}-{self.crops}"


PROBLEMS = [
    Problem("miniimagenet", "n03544143", 0),
    *(Problem("galaxyzoo1", anomaly, crops) for anomaly in ("merger", "dont_know") for crops in (0, 5)),
]


def main() -> None:
    """Measure the parts and print a table for each."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", nargs="+", type=int, default=list(range(len(PROBLEMS))), help="their numbers")
    options = parse_options(parser)
    problems = [Problem("demo", "lens", 0)] if options.quick else [PROBLEMS[i] for i in options.problems]
    for name in options.parts:
        rows = [row for problem in problems for row in PARTS[name](problem, options.runs / "cascade", options.quick)]
        write_csv(options.results / f"cascade_{name}.csv", rows)
        print(markdown(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]), flush=True)


def jobs(problem: Problem, runs: Path, quick: bool) -> list[Row]:
    """Score the archive in full and with a cascade: seconds of the processor, and what is kept of the full top."""
    _scored(problem, runs, quick, "off", name="warm-up")  # the first job of a process imports and compiles for all
    expected, full = _scored(problem, runs, quick, "off")
    found, cascade = _scored(problem, runs, quick, "auto")
    decision = json.loads((_folder(problem, runs) / "auto" / "summary.json").read_text(encoding="utf-8"))["cascade"]
    seen = found["full_look"].to_numpy() if decision["used"] else np.ones(len(found), bool)
    order = np.argsort(-expected["logit"].to_numpy(), kind="stable")
    images, sample = len(found), decision["sample"]
    return [
        {
            "anomaly": problem.anomaly, "crops": problem.crops, "first look": decision["side"],
            "used": str(decision["used"]), "cost": decision["cost"], "share": decision["share"],
            "kept of the sample": f"{decision['kept']} of {decision['top']}", "expected": decision["speed"],
            "speed, scoring": (images - sample) / cascade["score_parts"] / (images / full["score_parts"]),
            "speed, whole job": full["all"] / cascade["all"],
            "recall of the top 1 %": float(seen[order[: len(order) // 100]].mean()),
            "recall of the top 1,000": float(seen[order[:1000]].mean()),
            **{f"s, {name}": full[name] for name in ("all", "score_parts")},
            **{f"s, {name}, cascade": cascade[name] for name in ("all", "score_parts", "decide")},
        }
    ]  # fmt: skip


def shares(problem: Problem, runs: Path, quick: bool) -> list[Row]:
    """Choose thresholds on samples of a fifth; measure on the rest what they pass on, and what of the top they keep."""
    source, network, logits = _ranked(problem, runs, quick)
    rows: list[Row] = []
    for side in first_sides(network):
        features = _features(problem, runs, source, network, side)
        draws = [np.random.default_rng(draw).permutation(len(logits)) for draw in range(1 if quick else DRAWS)]
        cut = len(logits) // SAMPLE_DIVISOR
        fitted = [fit_student(features[order[:cut]], logits[order[:cut]]) for order in draws]
        for wanted in (len(logits) // 100, 1000):
            found = []
            for order, (student, unseen) in zip(draws, fitted, strict=True):
                taught, rest = order[:cut], order[cut:]
                first, top = student.predict(features[rest]), max(MIN_TOP, round(cut * wanted / len(logits)))
                chosen = choose_threshold(unseen, logits[taught], min(top, cut))
                best = np.argsort(-logits[rest], kind="stable")[: round(len(rest) * wanted / len(logits))]
                found.append(
                    {
                        "Spearman": float(spearmanr(first, logits[rest]).statistic),
                        "share": float(np.mean(first >= chosen.value)),
                        "recall": float(np.mean(first[best] >= chosen.value)),
                        "share that suffices": sufficient_share(first, logits[rest], len(best)),
                    }
                )
            means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
            lowest = min(each["recall"] for each in found)
            rows.append(
                {"anomaly": problem.anomaly, "crops": problem.crops, "first look": side, "top": wanted, **means,
                 "lowest recall": lowest}
            )  # fmt: skip
    return rows


def student(problem: Problem, runs: Path, quick: bool) -> list[Row]:
    """Compare the regression with a network fine-tuned to the full scores, both taught by the same images."""
    side = 32 if quick else 64
    source, network, logits = _ranked(problem, runs, quick)
    order = np.random.default_rng(0).permutation(len(logits))
    cut = len(order) // 2 if quick else TAUGHT
    taught, rest = order[:cut], order[cut:]
    features = _features(problem, runs, source, network, side)
    images = torch.cat([batch.images for batch in stream(source, list(source.ids), size=side, batch_size=256)])
    predictions = {
        "regression": fit_student(features[taught], logits[taught])[0].predict(features[rest]),
        "fine-tuned": fine_tuned(images[taught], logits[taught], images[rest], epochs=1 if quick else EPOCHS),
    }
    rows: list[Row] = []
    for name, first in predictions.items():
        rows.append({"anomaly": problem.anomaly, "crops": problem.crops, "student": f"{side} px, {name}"})
        rows[-1]["Spearman"] = float(spearmanr(first, logits[rest]).statistic)
        for percent in (1, 15):
            count = round(len(rest) * percent / 100)
            rows[-1][f"share for the top {percent} %"] = sufficient_share(first, logits[rest], count)
    return rows


def sufficient_share(first: np.ndarray, full: np.ndarray, top: int) -> float:
    """Compute the smallest share of images, best first, that holds 99 % of the top of the full ranking."""
    place = np.empty(len(full))
    place[np.argsort(-first, kind="stable")] = np.arange(1, len(full) + 1)
    best = np.sort(place[np.argsort(-full, kind="stable")[:top]])
    return float(best[int(np.ceil(0.99 * top)) - 1] / len(full))


def fine_tuned(
    images: UInt8[Tensor, "n c s s"], logits: np.ndarray, others: UInt8[Tensor, "m c s s"], *, epochs: int
) -> Float64[np.ndarray, " m"]:
    """Train Lite0 from its pretrained weights on standardised logits, with all eight orientations; predict others."""
    torch.manual_seed(0)
    _, backbone = build_backbone(
        name="tf_efficientnet_lite0", weights="bundled", channels=images.shape[1], image_size=images.shape[-1]
    )
    model = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.features, 1)).to(memory_format=torch.channels_last)
    torch.nn.init.zeros_(model[1].weight)
    targets = torch.tensor((logits - logits.mean()) / logits.std(), dtype=torch.float32)
    steps = epochs * -(-len(images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            batch = reoriented(images[chosen], int(torch.randint(8, ())))
            loss = (model(batch)[:, 0] - targets[chosen]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part)[:, 0] for part in others.split(256)])
    return found.numpy().astype(np.float64)


def _folder(problem: Problem, runs: Path) -> Path:
    folder = runs / str(problem)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _words(problem: Problem, quick: bool) -> list[str]:
    if quick:
        return [
            "dataset.source.count=1200",
            "dataset.source.rare_fraction=0.1",
            "dataset.source.size=32",
            "model.image_size=64",
            "model.weights=bundled",
        ]
    size = [f"model.image_size={TRAINED}", "model.weights=bundled"]
    data = [f"data.root={DATA / problem.dataset}", f"dataset.anomaly={problem.anomaly}"]
    return [*data, *size, *NO_CROPS, f"model.crops={problem.crops}"]


def _ranked(problem: Problem, runs: Path, quick: bool) -> tuple[ImageSource, Network, np.ndarray]:
    """Open the archive, train the probe and rank all images, or load what was trained; return the full logits, too."""
    words, folder = _words(problem, quick), _folder(problem, runs)
    task = open_task(problem.dataset, *words)
    if not (folder / "logits.npy").exists():
        learner = make_learner("probe", task, *words).fit(initial_labels(task, **LABELS))
        learner.save(folder)
        np.save(folder / "logits.npy", learner.rank(task.source.ids).logits)
    return task.source, load_network(folder / WEIGHTS), np.load(folder / "logits.npy")


def _scored(
    problem: Problem, runs: Path, quick: bool, cascade: str, *, name: str | None = None
) -> tuple[Any, dict[str, float]]:
    """Score the archive or read its scores; return them with the seconds of the processor."""
    _ranked(problem, runs, quick)
    folder = _folder(problem, runs)
    output, times = folder / (name or cascade), folder / f"{name or cascade}.csv"
    if not times.exists():
        data = [word for word in _words(problem, quick) if word.startswith(("data", "dataset.source"))]
        sample = ["scoring.sample=240"] if quick else []
        with _timed("decide", "score_parts") as seconds:
            started = time.process_time()
            score(
                f"run={folder / WEIGHTS}", f"dataset={problem.dataset}", *data, f"output={output}",
                f"scoring.cascade={cascade}", *sample,
            )  # fmt: skip
            seconds["all"] = time.process_time() - started
        write_csv(times, [dict(seconds)])
    values = times.read_text(encoding="utf-8").splitlines()
    read = dict(zip(values[0].split(","), map(float, values[1].split(",")), strict=True))
    return pq.read_table(output / "scores"), read


@contextmanager
def _timed(*names: str) -> Iterator[dict[str, float]]:
    """Measure the processor's seconds in functions of a scoring job."""
    usual, seconds = {name: getattr(job, name) for name in names}, dict[str, float]()

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            result = usual[name](*args, **options)
            seconds[name] = time.process_time() - started
            return result

        return call

    try:
        for name in names:
            setattr(job, name, timed(name))
        yield seconds
    finally:
        for name in names:
            setattr(job, name, usual[name])


def _features(problem: Problem, runs: Path, source: ImageSource, network: Network, side: int) -> np.ndarray:
    """Compute the features of a first look at all images, once for each data set."""
    path, inference = runs / f"{problem.dataset}-{side}.npy", Inference()
    if not path.exists():
        batch = inference.batch_size(network.spec.input_size)
        manifest = Manifest("", source.name, "", len(source), 4096, batch, "openvino", "auto", "cpu", features=False)
        look = FirstLook(network, inference, manifest, side)
        got = look_at(source, list(source.ids), Look(look.features, look.width, side, look.batch_size), workers=2)
        np.save(path, got.rows)
    return np.load(path)


def _cell(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


PARTS = {"jobs": jobs, "shares": shares, "student": student}


if __name__ == "__main__":
    main()
