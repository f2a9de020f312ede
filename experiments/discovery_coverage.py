"""Measure the coverage of the 90 % interval of the remaining anomalies in simulated searches (README, 11).

Images are points: normals in a few clouds, anomalies in one cloud that overlaps them. A logistic regression is trained
on the labels, and the top of its ranking is labelled, in cycles. The audit is drawn beforehand. With `sealed`, its
labels are hidden from the search, as in the main job; with `trained`, the search uses them, to show the bias in the
counts by rank. For "stop", the width is the share of searches that are advised to stop, and the coverage is the share
of these in which no more anomalies remain than the advice allows.
"""

import argparse
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from bench import Row, group_by, make_parser, markdown, parse_options, write_csv
from scipy.special import expit
from scipy.stats import beta

from anomalymatch import compose
from anomalymatch.active.audit import ALL
from anomalymatch.algorithms.probe.regression import fit_logistic
from anomalymatch.build_images import build
from anomalymatch.evaluation.discovery import LEVEL, Count, anomalies_among, anomalies_left

PREVALENCES, AUDITS = (0.001, 0.005, 0.01, 0.05), (20, 50, 100, 200, 500, 2000)
DIMENSIONS, CLOUDS, BATCH, START = 16, 5, 20, (3, 97)
CHECKED_CYCLES = (1, 5, 12)
"""Cycles after which the remaining anomalies are estimated."""
TRAINED_AUDIT = 500
STOPPING = build(compose().al.stopping)
HIGH = f"score above {STOPPING.score}"
cached_anomalies_among = cache(anomalies_among)


class State(NamedTuple):
    """Search after some cycles: the unlabelled images in ranked order, their scores, and labels and finds by cycle."""

    order: np.ndarray
    scores: np.ndarray
    history: list[Row]


def main() -> None:
    """Simulate all searches and print the table."""
    parser = make_parser(__doc__, quick="3 searches among 2,000 images")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--searches", type=int, default=40, help="searches for each prevalence")
    parser.add_argument("--draws", type=int, default=6, help="audits for each search and audit size")
    options = parse_options(parser)
    if options.quick:
        options.images, options.searches, options.draws = 2_000, 3, 3
    rows = [row for prevalence in PREVALENCES for row in simulate(prevalence, options)]
    summary = summarise(rows)
    write_csv(options.results / "discovery_coverage.csv", summary)
    print(coverage_table(summary))


def simulate(prevalence: float, options: argparse.Namespace) -> Iterator[Row]:
    """Simulate the searches of a prevalence, and yield a row for each interval."""
    for search in range(options.searches):
        rng = np.random.default_rng([search, round(prevalence * 1e4)])
        features, rare = make_archive(options.images, prevalence, rng)
        start = draw_start(rare, rng)
        states = run_search(features, rare, start)
        for audited in (size for size in AUDITS if size < options.images):
            for _ in range(options.draws):
                audit = draw_audit(len(rare), audited, rng)
                yield from check(states, audit, rare, prevalence=prevalence, audited=audited, method="sealed")
        audited = min(TRAINED_AUDIT, len(rare) // 4)
        audit = draw_audit(len(rare), audited, rng)
        states = run_search(features, rare, start, audit=audit)
        yield from check(states, audit, rare, prevalence=prevalence, audited=audited, method="trained")


def draw_audit(images: int, audited: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random audit and return its mask."""
    mask = np.zeros(images, dtype=bool)
    mask[rng.choice(images, audited, replace=False)] = True
    return mask


def make_archive(images: int, prevalence: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make features and truth; the distance of the anomalies from the normals is random."""
    rare = np.zeros(images, dtype=bool)
    rare[rng.choice(images, max(START[0], round(images * prevalence)), replace=False)] = True
    clouds = rng.normal(size=(CLOUDS, DIMENSIONS))
    features = clouds[rng.integers(CLOUDS, size=images)] + rng.normal(size=(images, DIMENSIONS))
    away = rng.normal(size=DIMENSIONS)
    features[rare] += away / np.linalg.norm(away) * rng.uniform(1.5, 5.0)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), rare


def draw_start(rare: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the anomalies and normals that a search starts from."""
    sides = (np.flatnonzero(rare), START[0]), (np.flatnonzero(~rare), START[1])
    return np.concatenate([rng.choice(side, count, replace=False) for side, count in sides])


def run_search(
    features: np.ndarray, rare: np.ndarray, start: np.ndarray, *, audit: np.ndarray | None = None
) -> dict[int, State]:
    """Label the top of each ranking; if an audit is given, train on its labels too and do not ask for them again."""
    labelled = np.zeros(len(rare), dtype=bool)
    labelled[start] = True
    known = np.zeros_like(labelled) if audit is None else audit
    states, history = {}, []
    for cycle in range(1, max(CHECKED_CYCLES) + 1):
        trained = labelled | known
        probe = fit_logistic(features[trained & rare], features[trained & ~rare], inverse_regularisation=10.0)
        rest = np.flatnonzero(~labelled)
        logits = probe.logits(features[rest])
        order = np.argsort(-logits, kind="stable")
        history.append({"labels": int(labelled.sum()), "found": int(rare[labelled].sum())})
        states[cycle] = State(rest[order], expit(logits[order]), list(history))
        asked = [i for i in rest[order].tolist() if not known[i]][:BATCH]
        labelled[asked] = True
    return {cycle: states[cycle] for cycle in CHECKED_CYCLES}


def check(states: dict[int, State], audit: np.ndarray, rare: np.ndarray, **names: float | str) -> Iterator[Row]:
    """Compare each interval after each checked cycle with the truth."""
    for cycle, state in states.items():
        truth, audited = rare[state.order], audit[state.order]
        tops = {f"top {top}": top for top in compose().al.audit_tops}
        tops |= {HIGH: int((state.scores > STOPPING.score).sum()), ALL: len(truth)}
        counts = {}
        for what, top in tops.items():
            seen, found = int(audited[:top].sum()), int((truth & audited)[:top].sum())
            real = int(truth[:top].sum())
            counts[what] = cached_anomalies_among(top, seen, found)
            yield {**names, "cycle": cycle, "what": what, **coverage(counts[what], real, top)}
        named = names | {"cycle": cycle}
        if names["method"] == "sealed":
            yield named | {"method": "sealed, Jeffreys", "what": ALL} | jeffreys_coverage(seen, found, real, top)
            yield from advice_coverage(named, counts, state.history, (real, int(truth[: tops[HIGH]].sum())))
        else:
            yield named | {"method": "trained, page", "what": ALL} | page_coverage(state, audit, rare)


def coverage(count: Count, real: int, images: int) -> Row:
    """Compare an interval with the truth; without an audited image, the interval is everything from 0 to all images."""
    low, high = (0.0, float(images)) if np.isnan(count.low) else (count.low, count.high)
    return {"holds": float(low <= real <= high), "width": high - low, "left": real}


def jeffreys_coverage(seen: int, found: int, real: int, images: int) -> Row:
    """Compare the interval from Jeffreys' posterior with the truth."""
    low, high = beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], found + 0.5, seen - found + 0.5)
    rest = images - seen
    return coverage(Count(0.0, found + round(rest * low), found + round(rest * high)), real, images)


def page_coverage(state: State, audit: np.ndarray, rare: np.ndarray) -> Row:
    """Compare the labelling page's interval with the true number of anomalies that nobody has labelled."""
    unlabelled = state.order[~audit[state.order]]
    real, audited = int(rare[unlabelled].sum()), int(audit.sum())
    count = anomalies_left(
        len(rare), audited, int(rare[audit].sum()), found=int(rare.sum()) - real, unlabelled=len(unlabelled)
    )
    return coverage(count, real, len(unlabelled))


def advice_coverage(names: Row, counts: dict[str, Count], history: list[Row], real: tuple[int, int]) -> Iterator[Row]:
    """Check any advice to stop: whether no more anomalies than it allows remain, in all or above the score."""
    found = int(history[-1]["found"])
    text = STOPPING.advice(counts[ALL], STOPPING.recent_yield(history), found=found, above=counts[HIGH])
    stop, above = "stop" in text and "soon" not in text, "above a score" in text
    for what, left, advised in (("stop", real[0], stop and not above), ("stop above", real[1], stop and above)):
        holds = float(left <= max(STOPPING.few, STOPPING.share * found)) if advised else np.nan
        yield {**names, "what": what, "holds": holds, "width": float(advised), "left": left}


def summarise(rows: list[Row]) -> list[Row]:
    """Average each kind of interval over cycles, searches and draws."""
    keys = ("method", "what", "prevalence", "audited")
    summary = []
    for members in group_by(rows, keys).values():
        left, holds, widths = ([float(row[key]) for row in members] for key in ("left", "holds", "width"))
        known = [value for value in holds if not np.isnan(value)]
        summary.append(
            {
                **{key: members[0][key] for key in keys},
                "intervals": len(members),
                "left": float(np.mean(left)),
                "coverage": float(np.mean(known)) if known else np.nan,
                "width": float((np.mean if str(members[0]["what"]).startswith("stop") else np.median)(widths)),
            }
        )
    return summary


def coverage_table(summary: list[Row]) -> str:
    """Format the summary: remaining anomalies, coverage, and median width of the interval."""
    columns = {
        "method": "",
        "what": "",
        "prevalence": ".1%",
        "audited": "",
        "left": ".1f",
        "coverage": ".3f",
        "width": ".2f",
    }
    return markdown([*columns], [[f"{row[key]:{spec}}" for key, spec in columns.items()] for row in summary])


if __name__ == "__main__":
    main()
