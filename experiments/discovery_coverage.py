"""How often the 90 % interval of what is left holds the truth, in simulated searches.

Images are points: normals in a few clouds, anomalies in one cloud that overlaps them. A logistic regression learns from
the labels, the top of its ranking is labelled, and it learns again. The audit is drawn beforehand; `sealed` hides its
labels from the search, as the main job does, `trained` gives them to it, to show what that does to the counts by rank.
Of "stop", the width is how often that is the advice, and the coverage how often no more is left than was promised.
"""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench import HERE, Row
from scipy.special import expit
from scipy.stats import beta

from anomalymatch.active.audit import ALL, HIGH, TOPS
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.probe.regression import fit_logistic
from anomalymatch.evaluation.advice import ABOVE, FEW, MISSED, advice, recent_yield
from anomalymatch.evaluation.discovery import LEVEL, Count, anomalies_among, anomalies_left
from anomalymatch.files import write_text

PREVALENCES, AUDITS = (0.001, 0.005, 0.01, 0.05), (20, 50, 100, 200, 500, 2000)
DIMENSIONS, CLOUDS, BATCH, START = 16, 5, 20, (3, 97)
LOOKS = (1, 5, 12)
"""Cycles after which what is left is estimated."""
TRAINED_AUDIT = 500
among = cache(anomalies_among)


class State(NamedTuple):
    """A search after some cycles: the unlabelled, best first, their scores, and the labels and finds so far."""

    order: np.ndarray
    scores: np.ndarray
    history: list[Row]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--searches", type=int, default=40, help="of each prevalence")
    parser.add_argument("--draws", type=int, default=6, help="audits of each search and size")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="3 searches among 2,000 images")
    options = parser.parse_args()
    if options.quick:
        options.images, options.searches, options.draws = 2_000, 3, 3
    rows = [row for prevalence in PREVALENCES for row in of_prevalence(prevalence, options)]
    summary = summarise(rows)
    write_text(options.results / "discovery_coverage.csv", to_csv(summary))
    print(markdown(summary))


def of_prevalence(prevalence: float, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each interval: whether it holds the truth."""
    for search in range(options.searches):
        rng = np.random.default_rng([search, round(prevalence * 1e4)])
        features, rare = archive(options.images, prevalence, rng)
        start = first_labels(rare, rng)
        states = run_search(features, rare, start)
        for audited in (size for size in AUDITS if size < options.images):
            for _ in range(options.draws):
                sample = np.zeros(len(rare), dtype=bool)
                sample[rng.choice(len(rare), audited, replace=False)] = True
                yield from judged(states, sample, rare, prevalence=prevalence, audited=audited, method="sealed")
        sample = np.zeros(len(rare), dtype=bool)
        sample[rng.choice(len(rare), min(TRAINED_AUDIT, len(rare) // 4), replace=False)] = True
        states = run_search(features, rare, start, audit=sample)
        yield from judged(states, sample, rare, prevalence=prevalence, audited=int(sample.sum()), method="trained")


def archive(images: int, prevalence: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features and truth; how far the anomalies lie from the normals differs from archive to archive."""
    rare = np.zeros(images, dtype=bool)
    rare[rng.choice(images, max(START[0], round(images * prevalence)), replace=False)] = True
    clouds = rng.normal(size=(CLOUDS, DIMENSIONS))
    features = clouds[rng.integers(CLOUDS, size=images)] + rng.normal(size=(images, DIMENSIONS))
    away = rng.normal(size=DIMENSIONS)
    features[rare] += away / np.linalg.norm(away) * rng.uniform(1.5, 5.0)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), rare


def first_labels(rare: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Anomalies and normals that a search starts from, as a benchmark does."""
    sides = (np.flatnonzero(rare), START[0]), (np.flatnonzero(~rare), START[1])
    return np.concatenate([rng.choice(side, count, replace=False) for side, count in sides])


def run_search(
    features: np.ndarray, rare: np.ndarray, start: np.ndarray, *, audit: np.ndarray | None = None
) -> dict[int, State]:
    """Label the top of each ranking; with `audit`, learn from its labels too, and do not ask for it again."""
    labelled = np.zeros(len(rare), dtype=bool)
    labelled[start] = True
    known = np.zeros_like(labelled) if audit is None else audit
    states, history = {}, []
    for cycle in range(1, max(LOOKS) + 1):
        learnt = labelled | known
        probe = fit_logistic(features[learnt & rare], features[learnt & ~rare], inverse_regularisation=10.0)
        rest = np.flatnonzero(~labelled)
        logits = probe.logits(features[rest])
        order = np.argsort(-logits, kind="stable")
        history.append({"labels": int(labelled.sum()), "found": int(rare[labelled].sum())})
        states[cycle] = State(rest[order], expit(logits[order]), list(history))
        asked = [i for i in rest[order].tolist() if not known[i]][:BATCH]
        labelled[asked] = True
    return {cycle: states[cycle] for cycle in LOOKS}


def judged(states: dict[int, State], sample: np.ndarray, rare: np.ndarray, **names: float | str) -> Iterator[Row]:
    """Each interval of each look beside the truth."""
    for cycle, state in states.items():
        truth, audited = rare[state.order], sample[state.order]
        tops = {f"top {top}": top for top in TOPS} | {HIGH: int((state.scores > ABOVE).sum()), ALL: len(truth)}
        counts = {}
        for what, top in tops.items():
            seen, found = int(audited[:top].sum()), int((truth & audited)[:top].sum())
            real = int(truth[:top].sum())
            counts[what] = among(top, seen, found)
            yield {**names, "cycle": cycle, "what": what, **verdict(counts[what], real, top)}
        about = names | {"cycle": cycle}
        if names["method"] == "sealed":
            yield about | {"method": "sealed, Jeffreys", "what": ALL} | jeffreys(seen, found, real, top)
            yield from stopped(about, counts, state.history, (real, int(truth[: tops[HIGH]].sum())))
        else:
            yield about | {"method": "trained, page", "what": ALL} | on_page(state, sample, rare)


def verdict(count: Count, real: int, images: int) -> Row:
    """Whether the interval holds the truth; an audit that has no image there says 0 to all."""
    low, high = (0.0, float(images)) if np.isnan(count.low) else (count.low, count.high)
    return {"holds": float(low <= real <= high), "width": high - low, "left": real}


def jeffreys(seen: int, found: int, real: int, images: int) -> Row:
    """The same by the quantiles of Jeffreys' posterior."""
    low, high = beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], found + 0.5, seen - found + 0.5)
    rest = images - seen
    return verdict(Count(0.0, found + round(rest * low), found + round(rest * high)), real, images)


def on_page(state: State, sample: np.ndarray, rare: np.ndarray) -> Row:
    """The estimate of the labelling page: all anomalies of the archive less those found, by the search or the audit."""
    unlabelled = state.order[~sample[state.order]]
    real, audited = int(rare[unlabelled].sum()), int(sample.sum())
    count = anomalies_left(
        len(rare), audited, int(rare[sample].sum()), found=int(rare.sum()) - real, unlabelled=len(unlabelled)
    )
    return verdict(count, real, len(unlabelled))


def stopped(names: Row, counts: dict[str, Count], history: list[Row], real: tuple[int, int]) -> Iterator[Row]:
    """Whether the advice is to stop, and if so, whether no more than promised is left, in all or above the score."""
    found = int(history[-1]["found"])
    said = advice(counts[ALL], recent_yield(history), found=found, above=counts[HIGH])
    stop, above = "stop" in said and "soon" not in said, "above a score" in said
    for what, left, advised in (("stop", real[0], stop and not above), ("stop above", real[1], stop and above)):
        holds = float(left <= max(FEW, MISSED * found)) if advised else np.nan
        yield {**names, "what": what, "holds": holds, "width": float(advised), "left": left}


def summarise(rows: list[Row]) -> list[Row]:
    """One line for each kind of interval, over cycles, searches and draws."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["what"], row["prevalence"], row["audited"]), []).append(row)
    return [
        {
            **dict(zip(("method", "what", "prevalence", "audited"), key, strict=True)),  # type: ignore[dict-item]
            "intervals": len(members),
            "left": float(np.mean([float(row["left"]) for row in members])),
            "coverage": _mean([float(row["holds"]) for row in members]),
            "width": float(np.median([float(row["width"]) for row in members]))
            if not str(key[1]).startswith("stop")
            else _mean([float(row["width"]) for row in members]),
        }
        for key, members in groups.items()
    ]


def markdown(summary: list[Row]) -> str:
    """The table of the README: coverage, and the median width of the interval."""
    lines = ["| method | what | prevalence | audited | left | coverage | width |", "|---|---|---|---|---|---|---|"]
    for row in summary:
        values = f"{row['left']:.1f} | {row['coverage']:.3f} | {row['width']:.2f}"
        lines.append(f"| {row['method']} | {row['what']} | {row['prevalence']:.1%} | {row['audited']} | {values} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else np.nan


if __name__ == "__main__":
    main()
