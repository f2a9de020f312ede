"""The run folder: its files, and the state that a resumed run continues from."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from anomalymatch.algorithms.base import COLD, GUARD, ignore_step
from anomalymatch.checksums import check_file, write_checksums
from anomalymatch.data.label_log import LabelLog
from anomalymatch.errors import StorageError
from anomalymatch.files import atomic_folder, make_folder, remove_leftovers, storage_errors, write_text
from anomalymatch.ranking import Ranking
from anomalymatch.text import csv_cell
from anomalymatch.types import Row

CONFIG, SCORES, METRICS, STEPS = "config.yaml", "scores.parquet", "metrics.json", "steps.csv"
LABELS, SCORES_CSV, LIVE, LOCK = "labels.csv", "scores.csv", "live.jsonl", ".lock"
REPORT = "report.html"
CANDIDATES = "candidates.txt"
"""File of a cycle that ranked candidates only, with their number in words."""


class LiveSteps:
    """Step listener that appends each training step to a JSON-lines file at once, from any process, and logs it.

    In a training process of its own, the steps are only written; `finish` logs them afterwards.
    """

    def __init__(self, path: Path, cycle: int, log: Callable[[dict[str, float]], None]) -> None:
        self.path, self.cycle, self._log = path, cycle, log
        self._rows: list[dict[str, float]] = []
        write_text(path, "")

    def __call__(self, row: dict[str, float]) -> None:
        """Append and log one step."""
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"cycle": self.cycle, **row}, indent=None) + "\n")
        self._rows.append(dict(row))
        self._log(row)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "cycle": self.cycle, "_rows": [], "_log": ignore_step}

    def finish(self) -> list[dict[str, float]]:
        """Return all steps of the training, after logging the steps of another process."""
        if not self._rows:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
                del row["cycle"]
                self._rows.append(row)
                self._log(row)
        return self._rows


class RunReader:
    """Run folder opened for reading: its paths and finished cycles.

    The folder contains

        config.yaml  labels.sqlite  labels.csv  metrics.csv  scores.csv  rejects.parquet  report.html  plots/
        cycles/01/   scores.parquet  weights.safetensors  weights.json  metrics.json  steps.csv  labels.csv  *.png
                     left.csv, estimates of the remaining anomalies; guard.txt, findings of the training's guard, if any
                     candidates.txt, number of the images that were ranked, if these were not all
                     checksums.json, of all these files
        audit.csv    labels of the random audit, which the search does not use, if there is one
        description.json, description.parquet   what is looked for, in words, and the ranking by it, if there is one
        live.jsonl   steps of the current or last training
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cycle(self, number: int) -> Path:
        """Return the folder of a cycle."""
        return self.path / "cycles" / f"{number:02d}"

    def finished_cycles(self) -> int:
        """Count the complete cycles, from the first up to a gap."""
        names = [p.name for p in (self.path / "cycles").glob("*") if re.fullmatch(r"\d+", p.name)]
        done = {int(name) for name in names}
        return next(number for number in range(len(done) + 1) if number + 1 not in done)

    def report(self) -> Path | None:
        """Return the path of the report; None if there is none, or if it is a link that leaves the folder."""
        path = (self.path / REPORT).resolve()
        return path if path.parent == self.path.resolve() and path.is_file() else None

    def ranking(self, cycle: int) -> Ranking:
        """Read the scores of a finished cycle."""
        return Ranking.read(self.cycle(cycle) / SCORES)

    def steps(self, cycle: int) -> list[dict[str, str]]:
        """Read the training steps of a finished cycle; none if the file is damaged."""
        try:
            check_file(self.cycle(cycle) / STEPS)
            with (self.cycle(cycle) / STEPS).open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        except (StorageError, OSError, ValueError, csv.Error):
            return []

    def seconds(self, cycle: int) -> float:
        """Return the seconds that a finished cycle took; NaN if they are unknown."""
        try:
            metrics = json.loads((self.cycle(cycle) / "metrics.json").read_text(encoding="utf-8"))
            return float(metrics["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return math.nan

    def began_cold(self, cycle: int) -> bool:
        """Tell whether a finished cycle was ranked by the cold start."""
        return (self.cycle(cycle) / COLD).exists()

    def ranked_candidates(self, cycle: int) -> bool:
        """Tell whether a finished cycle ranked only the neighbours of labelled anomalies, not all images."""
        return (self.cycle(cycle) / CANDIDATES).exists()

    def guard_notes(self, cycle: int) -> list[str]:
        """Read the findings of the guard in a finished cycle."""
        path = self.cycle(cycle) / GUARD
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []

    def live_steps(self) -> list[Row]:
        """Read the training steps that `LiveSteps` has written; an incomplete last line is left out."""
        try:
            lines = (self.path / LIVE).read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def busy(self) -> bool:
        """Tell whether a process is working in the folder."""
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with lock:
                return False
        except Timeout:
            return True


class RunFolder(RunReader):
    """Run folder opened for writing, by one process at a time.

    The folder of a cycle appears by one rename when it is complete, so that a killed run loses at most that cycle.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(make_folder(path))
        self._lock = FileLock(path / LOCK, timeout=1)  # `busy` holds it for a moment
        with storage_errors(path):
            try:
                self._lock.acquire()
            except Timeout:
                raise StorageError(
                    f"another process is working in {path}: wait for it or choose another folder"
                ) from None
        for folder in (path, path / "cycles", path / "plots"):
            remove_leftovers(folder)
        self._newest: tuple[int, Ranking] | None = None
        try:
            self.labels = LabelLog.of_run(path)
        except StorageError:
            self._lock.release()
            raise

    def close(self) -> None:
        """Release the folder for other processes."""
        self.labels.close()
        self._lock.release()

    @property
    def plots(self) -> Path:
        """Return the folder of the figures."""
        return make_folder(self.path / "plots")

    @contextmanager
    def write_cycle(self, number: int) -> Iterator[Path]:
        """Yield a temporary folder that becomes the cycle's when the block succeeds."""
        with atomic_folder(self.cycle(number)) as temporary:
            yield temporary
            write_checksums(temporary)

    def ranking(self, cycle: int) -> Ranking:
        """Return the scores of a finished cycle; those of the last one asked for, or kept, are in memory."""
        if self._newest is None or self._newest[0] != cycle:
            self._newest = cycle, super().ranking(cycle)
        return self._newest[1]

    def keep(self, cycle: int, ranking: Ranking) -> None:
        """Keep in memory the ranking that was written as that of a cycle, so that it need not be read."""
        self._newest = cycle, ranking

    def rows(self) -> list[Row]:
        """Read the metrics of the finished cycles; undefined values are NaN.

        Raises:
            StorageError: if one is missing or corrupt.
        """
        return [self._row(number) for number in range(1, self.finished_cycles() + 1)]

    def write_metrics(self) -> None:
        """Write metrics.csv from the finished cycles."""
        write_text(self.path / "metrics.csv", to_csv(self.rows()))

    def _row(self, number: int) -> Row:
        path = self.cycle(number) / METRICS
        check_file(path)
        try:
            row = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(
                f"{path} is missing or corrupt: delete the folder of that cycle to compute it again"
            ) from error
        return {key: math.nan if value is None else value for key, value in row.items()}


def page_lock(run: Path) -> BaseFileLock:
    """Take the lock that makes one process the only one with a labelling page on a run folder; release it at the end.

    Raises:
        StorageError: if another process has it.
    """
    lock = FileLock(make_folder(run) / ".page.lock", timeout=0, thread_local=False, is_singleton=True)
    with storage_errors(run):
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"another labelling page is open on {run}: several people can use one page, each under a name, so open "
                f"the address of that page or close it first"
            ) from None
    return lock


def to_json(row: Mapping[str, float | int | str], indent: int | None = 2) -> str:
    """Format a row as JSON; NaN becomes null."""
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    return json.dumps(plain, indent=indent)


def to_csv(rows: Sequence[Mapping[str, float | int | str]]) -> str:
    """Format rows as CSV; the columns are the union of their keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows)
    return text.getvalue()
