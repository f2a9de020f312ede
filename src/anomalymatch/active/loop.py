"""The active-learning loop: label, train, rank, evaluate, and repeat."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from anomalymatch.active.audit import (
    AUDIT,
    LEFT,
    advise,
    left_by_rank,
    left_in_all,
    left_unranked,
    sealed_labels,
)
from anomalymatch.active.candidates import Candidates, NeighbourCandidates
from anomalymatch.active.cold_start import ColdStart
from anomalymatch.active.oracles import Oracle
from anomalymatch.active.report import COLD_NOTE, EVIDENCE, FALSE_POSITIVES, TOP, RunReport, write_sheets
from anomalymatch.active.run_folder import (
    CANDIDATES,
    LABELS,
    LIVE,
    METRICS,
    SCORES,
    SCORES_CSV,
    STEPS,
    LiveSteps,
    RunFolder,
    to_csv,
    to_json,
)
from anomalymatch.active.text_ranker import TextRanker, read_description, save_description, save_ranking
from anomalymatch.active.tracking import Tracker
from anomalymatch.algorithms.base import Learner
from anomalymatch.checks import check_range
from anomalymatch.checksums import damaged_files, write_checksums
from anomalymatch.data.label_log import FROM_FILE, csv_text, export_csv
from anomalymatch.data.labels import have_both_classes
from anomalymatch.data.task import Task, initial_labels
from anomalymatch.errors import LabelError, NoReadableImageError
from anomalymatch.evaluation.advice import StoppingRule
from anomalymatch.evaluation.metrics import cycle_metrics
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking, write_rejects
from anomalymatch.types import Label, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSpec:
    """Protocol of the loop: the settings of `conf/al/default.yaml`, which says what they mean."""

    cycles: int
    budget: int
    pool_size: int | None
    anomalies: int
    normals: int
    audit: int
    audit_tops: Sequence[int]
    stopping: StoppingRule

    def __post_init__(self) -> None:
        check_range("al.cycles", self.cycles, low=1)
        check_range("al.budget", self.budget, low=1)
        check_range("al.audit", self.audit, low=0)
        check_range("al.pool_size", self.pool_size, low=1, null=True)
        for top in self.audit_tops:
            check_range("al.audit_tops", top, low=1)


class ActiveLoop:
    """Active-learning loop that runs cycles in a run folder, and continues after the last finished one.

    All random numbers follow from `seed` and the cycle, and all state is read from the folder, so that a resumed run
    ends with the same numbers as an uninterrupted one.

    Args:
        task: the images and, in a benchmark, the truth.
        learner: trains and ranks. A `ColdStart` also chooses the first images to label, instead of random ones.
        oracle: answers queries; None if the truth is unknown and a person labels.
        given: labels from a file beside the images, for a task without truth.
        baseline: the probe, reported beside any other learner; None to leave it out.
        described: ranks by the description of the run, and the folder keeps that order; None without a description.
        spec: the protocol.
        seed: seed of the random numbers.
        candidates: chooses the images that are ranked in all cycles but the last; None ranks all images.
    """

    def __init__(
        self,
        task: Task,
        learner: Learner,
        oracle: Oracle | None,
        *,
        given: dict[str, Label],
        baseline: Learner | None,
        spec: LoopSpec,
        seed: int,
        described: TextRanker | None = None,
        candidates: NeighbourCandidates | None = None,
    ) -> None:
        self.described, self.candidates = described, candidates
        self.task, self.learner, self.oracle, self.given, self.baseline = task, learner, oracle, given, baseline
        self.spec, self.seed = spec, seed
        self._sealed = {} if task.anomalies is None else sealed_labels(task, spec.audit, seed)
        if task.anomalies is None and spec.audit:
            logger.warning('al.audit=%d is not used: label in the order "random audit" on the page instead', spec.audit)
        if oracle is None and candidates is not None:
            logger.warning("al.candidates=neighbours is not used: where a person labels, all images are ranked")
            self.candidates = None
        if oracle is not None and not isinstance(learner, ColdStart):
            self._start()  # reports too few images before anything is written

    def run(self, folder: RunFolder, tracker: Tracker) -> list[Row]:
        """Run the cycles that are missing in `folder`, and log them; return the metrics of all cycles."""
        self.folder, self.tracker, self.report = folder, tracker, RunReport(folder, self.task, self.spec.stopping)
        if self._sealed:
            export_csv(self._sealed, folder.path / AUDIT)
        self._save_description()
        done = self.folder.finished_cycles()
        if done:
            logger.info("Resuming %s after cycle %d", self.folder.path, done)
            self._repair(done)
            self._publish(done)  # the run may have been killed before this step
            if done < self.spec.cycles:
                self.learner.restore(self.folder.cycle(done))
            else:
                logger.info("All %d cycles are done; al.cycles=%d adds one", done, done + 1)
        for cycle in range(done + 1, self.spec.cycles + 1):
            labels = self._labels(cycle)
            if labels is None:
                logger.warning(
                    "No new labels since cycle %d and nobody to ask: label more images, then resume this run", cycle - 1
                )
                break
            pool = self._pool(cycle, labels)
            if not pool:
                self._nothing_left(cycle)
                break
            self._cycle(cycle, labels, pool)
        return self.folder.rows()

    def _save_description(self) -> None:
        """Write the ranking by the description; a description in the folder, which a person may have changed, stays."""
        if self.described is None or read_description(self.folder.path) is not None:
            return
        for note in self.described.notes():
            logger.warning("%s", note)
        ranking = self.described.rank([*self.task.pool, *self.task.holdout])
        save_description(self.folder.path, self.described.descriptions)
        save_ranking(self.folder.path, ranking)

    def _repair(self, done: int) -> None:
        """Compute damaged files of the finished cycles again; without numbers they are only reported."""
        for cycle in range(1, done + 1):
            path = self.folder.cycle(cycle)
            damaged = damaged_files(path)
            if not damaged:
                continue
            if set(damaged) <= {STEPS}:
                logger.warning("%s is damaged: the report leaves the training steps of that cycle out", path / STEPS)
                continue
            labels = self.folder.labels.current(until_cycle=cycle - 1)
            if set(damaged) <= {STEPS, LEFT, TOP, EVIDENCE, FALSE_POSITIVES}:
                logger.warning("%s is damaged: written again", path / damaged[0])
                present, ranking = self._present(labels), self.folder.ranking(cycle)
                left = self._left(present, ranking, complete=not self.folder.ranked_candidates(cycle))
                self._write_derived(path, present, ranking, left)
                write_checksums(path)
                continue
            logger.warning("%s is damaged: cycle %d is computed again", path / damaged[0], cycle)
            if cycle > 1:
                self.learner.restore(self.folder.cycle(cycle - 1))
            self._compute(cycle, labels, self._pool(cycle, labels))

    def _labels(self, cycle: int) -> dict[str, Label] | None:
        """Return the labels that `cycle` trains on; None if there are no new ones."""
        log = self.folder.labels
        previous = cycle - 1
        last = log.last_cycle()
        if last is None or last < previous:
            new = self._ask(cycle)
            if not new and previous and not self._missed_labels(previous):
                return None
            scores = self.folder.ranking(previous).score_of(new) if previous else {}
            who = FROM_FILE if self.oracle is None else "oracle" if previous else "start"
            log.append(new, annotator=who, cycle=previous, scores=scores)
        labels = log.current(until_cycle=previous)
        export_csv(labels, self.folder.path / LABELS)
        return labels

    def _missed_labels(self, cycle: int) -> bool:
        """Tell whether images were labelled while `cycle` was training."""
        path = self.folder.cycle(cycle) / LABELS
        return path.exists() and path.read_text(encoding="utf-8") != csv_text(self.folder.labels.current())

    def _ask(self, cycle: int) -> dict[str, Label]:
        if self.oracle is None:
            new = self.folder.labels.new_labels(self.given)
            if not new and cycle == 1 and self.learner.needs_labels:
                raise LabelError(
                    f"{self.task.source.name} has no labels to start from: put a labels.csv with the columns "
                    f"filename,label (anomaly or normal) beside the images, set dataset.anomaly=CLASS, "
                    f"or rank without labels by al.cold_start=mixed"
                )
            return new
        if cycle == 1:
            return self._start()
        known, before = self.folder.labels.current(), self.folder.labels.current(until_cycle=cycle - 2)
        ranking = self.task.unlabelled(self.folder.ranking(cycle - 1), known)
        ids = None
        if self.folder.ranked_candidates(cycle - 1):
            ids = ranking.ids
        elif (candidates := self._candidates(cycle - 1, before)) is not None:
            # It was the last cycle, and ranked all images, until al.cycles was raised.
            ids, ranking = candidates.ids, ranking.restrict(candidates.ids)
        pool = frozenset(self._pool(cycle - 1, before) if ids is None else ids)
        rng = np.random.default_rng([self.seed, cycle, 0x0AC])
        budget, remaining = self.spec.budget, (self.spec.cycles - cycle) * self.spec.budget
        return self.oracle(ranking, pool, budget, rng=rng, last=self._last_answers(cycle), remaining=remaining)

    def _last_answers(self, cycle: int) -> dict[str, Label]:
        """Return the labels of the query before that of `cycle`; the initial labels are no query."""
        if cycle < 3:
            return {}
        before = self.folder.labels.current(until_cycle=cycle - 3)
        return {id_: label for id_, label in self.folder.labels.current().items() if id_ not in before}

    def _start(self) -> dict[str, Label]:
        if isinstance(self.learner, ColdStart):
            first = self.learner.first(self._pool(1, {}), self.task.pool, self.spec.budget)
            return {id_: self.task.label(id_) for id_ in first}
        return initial_labels(self.task, anomalies=self.spec.anomalies, normals=self.spec.normals, seed=self.seed)

    def _pool(self, cycle: int, labels: dict[str, Label]) -> list[str]:
        """Draw the unlabelled images that `cycle` trains on."""
        pool, size = self.task.pool, self.spec.pool_size
        unlabelled = np.flatnonzero(~np.fromiter(map(labels.__contains__, pool), bool, len(pool)))
        if size is not None and size < len(unlabelled):
            rng = np.random.default_rng([self.seed, cycle, 0x900])
            unlabelled = unlabelled[np.sort(rng.choice(len(unlabelled), size, replace=False))]
        return [pool[i] for i in unlabelled.tolist()]

    def _candidates(self, cycle: int, labels: dict[str, Label]) -> Candidates | None:
        """Choose the images that may be labelled after `cycle`; None for all."""
        if self.candidates is None or not have_both_classes(labels):
            return None
        rng = np.random.default_rng([self.seed, cycle, 0x5EA])
        return self.candidates.choose(labels, self.spec.budget, rng)

    def _nothing_left(self, cycle: int) -> None:
        if cycle == 1:
            raise LabelError(f"all images of {self.task.source.name} are labelled: there is nothing left to rank")
        logger.warning("All images are labelled after cycle %d: there is nothing left to find", cycle - 1)

    def _present(self, given: dict[str, Label]) -> dict[str, Label]:
        """Return the labels of the images that are still in the archive; the others rest until they are back."""
        pool, holdout = self.task.members
        present = {id_: label for id_, label in given.items() if id_ in pool or id_ in holdout}
        gone = [id_ for id_ in given if id_ not in present]
        if gone:
            logger.warning(
                "%d labelled images are not in %s: their labels are kept but not used; the first is %s",
                len(gone),
                self.task.source.name,
                gone[0],
            )
        return present

    def _cycle(self, cycle: int, labels: dict[str, Label], pool: list[str]) -> None:
        self._compute(cycle, labels, pool)
        self._publish(cycle)

    def _compute(self, cycle: int, given: dict[str, Label], pool: list[str]) -> None:
        """Train, rank and measure, and write the folder of the cycle."""
        start = time.monotonic()
        labels = self._present(given)
        live = LiveSteps(self.folder.path / LIVE, cycle, partial(self.tracker.log_step, cycle))
        self.learner.on_step = live
        try:
            self.learner.fit(labels, pool=pool, cycle=cycle)
        except NoReadableImageError as error:
            write_rejects(error.rejects, self.folder.path / "rejects.parquet")
            raise
        steps = live.finish()
        candidates = self._candidates(cycle, labels) if cycle < self.spec.cycles else None
        ids = self.task.pool
        if candidates is not None:
            logger.info("Cycle %d: %s", cycle, candidates)
            ids = [*candidates.ids, *(id_ for id_ in labels if id_ in self.task.members[0])]
        ranked, complete = [*ids, *self.task.holdout], candidates is None
        ranking = self.learner.rank(ranked)
        baseline = self._baseline_ranking(labels, pool, ranked)
        row = cycle_metrics(cycle, self.task, labels, ranking, baseline, complete=complete)
        left = self._left(labels, ranking, complete=complete)
        row |= {key: left[-1][key] for key in ("audited", "left", "left_low", "left_high")}
        row["seconds"] = round(time.monotonic() - start, 2)
        write_rejects(ranking.rejects, self.folder.path / "rejects.parquet")
        with self.folder.write_cycle(cycle) as path:
            ranking.write(path / SCORES)
            self.learner.save(path)
            export_csv(given, path / LABELS)
            write_text(path / STEPS, to_csv(steps))
            if candidates is not None:
                write_text(path / CANDIDATES, f"{candidates}\n")
            self._write_derived(path, labels, ranking, left)
            write_text(path / METRICS, to_json(row))
        self.folder.keep(cycle, ranking)

    def _write_derived(self, path: Path, labels: dict[str, Label], ranking: Ranking, left: list[Row]) -> None:
        """Write the files of a cycle that follow from its ranking."""
        write_text(path / LEFT, to_csv(left))
        write_sheets(path, self.task, labels, ranking)

    def _publish(self, cycle: int) -> None:
        """Write tables, figures and report of the finished cycles up to `cycle`, and log that cycle."""
        self.folder.write_metrics()
        self.folder.ranking(cycle).write_csv(self.folder.path / SCORES_CSV)
        self.report.write()
        rows = self.folder.rows()
        todo = advise(self.folder, rows, self.spec.stopping)
        if todo:
            logger.info("Cycle %d: %s", cycle, todo)
        if self.folder.began_cold(cycle):
            logger.warning("Cycle %d: %s", cycle, COLD_NOTE)
        points = None if self.task.anomalies is None else self.report.curves(cycle)
        self.tracker.log_cycle(cycle, rows[-1], self.folder, points)

    def _left(self, labels: dict[str, Label], ranking: Ranking, *, complete: bool) -> list[Row]:
        if self.task.anomalies is None:
            return [left_in_all(self.task, labels, ranking, self.seed)]
        if not complete:
            return [left_unranked(self.task, labels, self._sealed)]
        rest = self.task.unlabelled(ranking, labels)
        return left_by_rank(rest, self._sealed, self.spec.audit_tops, self.spec.stopping.score)

    def _baseline_ranking(self, labels: dict[str, Label], pool: list[str], ranked: Sequence[str]) -> Ranking | None:
        if self.baseline is None or not have_both_classes(labels):
            return None
        self.baseline.fit(labels, pool=pool)
        return self.baseline.rank(ranked)
