"""Training in a process of its own: the page stays responsive, and a crash takes nothing with it."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from anomalymatch.active.run_folder import RunReader
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.files import storage_errors

logger = logging.getLogger(__name__)


PROGRAM = (sys.executable, "-m", "anomalymatch.run")
LOG = "training.log"
POLL_S = 0.5
PATIENCE_S = 15.0
"""How long a training that was asked to stop may take to do so."""
SHOWN_STEPS, SHOWN_LINES = 500, 200
SERIES = {
    "labelled loss": "loss_lb",
    "unlabelled loss": "loss_ulb",
    "contrastive loss": "loss_contrast",
    "pass rate": "pass_rate",
    "pass rate, anomaly": "pass_rate_anomaly",
}


@dataclass(frozen=True)
class TrainingStatus:
    """What the page shows of a training.

    Attributes:
        state: idle, running, stopping, failed or finished.
        cycle: number of the training that goes on, or was the last; 0 before the first.
        step: steps that are done.
        steps: steps in all; 0 if they are not known.
        seconds: since it began, or how long it took.
        losses: by name, of at most 500 steps.
        message: why it failed, in one line; else empty.
        log: the last lines that the training printed.
    """

    state: str = "idle"
    cycle: int = 0
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    message: str = ""
    log: Sequence[str] = ()


class Training:
    """Runs one more cycle of a run folder, by the command that a person would type: `anomalymatch.run resume=RUN`.

    It outlives the page: after a crash of the page, the next one watches the training that still goes on.

    Args:
        run: the run folder, with its configuration.
        steps: training steps of a cycle; 0 if they are not known.
        program: the command without its words.
        check: raises a `LabelError` if there is nothing to train on yet.
        on_change: called when a training begins or ends, from another thread.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        program: Sequence[str] = PROGRAM,
        check: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self._run, self._steps, self._program = RunReader(run), steps, program
        self._check, self._on_change = check, on_change
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._state, self._message, self._cycle = "idle", "", self._run.finished_cycles()
        self._began = self._ended = time.monotonic()
        self._watcher: threading.Thread | None = None
        if self._run.busy():
            self._state = "running"
            self._cycle += 1
            self._watch(self._wait_for_other)

    @property
    def running(self) -> bool:
        """Whether a training goes on."""
        return self._state in ("running", "stopping")

    def start(self) -> None:
        """Begin a training.

        Raises:
            LabelError: if one goes on, or there is nothing to train on yet.
            StorageError: if its log cannot be written.
        """
        with self._lock:
            if self.running:
                raise LabelError("a training goes on: wait for it, or stop it")
            self._check()
            self._cycle = self._run.finished_cycles() + 1
            path = self._run.path / LOG
            with storage_errors(path), path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._program, f"resume={self._run.path}", f"al.cycles={self._cycle}"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"COLUMNS": "160"},  # its lines are for the page, not for a narrow terminal
                    start_new_session=True,  # Ctrl-C in the terminal of the page is not meant for it
                )
            self._message, self._began, self._state = "", time.monotonic(), "running"
            self._watch(self._wait)
        self._on_change()

    def stop(self) -> None:
        """Break the training off, as Ctrl-C would: finished cycles are kept, and `start` begins this one anew.

        Raises:
            StorageError: if the training was started by another program.
        """
        with self._lock:
            if not self.running:
                return
            if self._process is None:
                raise StorageError("this training was not started from here: stop it where it was started")
            self._state = "stopping"
            _signal(self._process, signal.SIGINT)
            insistence = threading.Timer(PATIENCE_S, _kill, [self._process])
            insistence.daemon = True
            insistence.start()
        self._on_change()

    def status(self) -> TrainingStatus:
        """How it stands."""
        rows = [row for row in self._run.live_steps() if row.get("cycle") == self._cycle]
        thin = rows[:: -(-len(rows) // SHOWN_STEPS) or 1]
        losses = {name: [float(row[key]) for row in thin if row.get(key) is not None] for name, key in SERIES.items()}
        return TrainingStatus(
            state=self._state,
            cycle=self._cycle,
            step=len(rows),
            steps=self._steps,
            seconds=(time.monotonic() if self.running else self._ended) - self._began,
            losses={name: values for name, values in losses.items() if values},
            message=self._message,
            log=self._log()[-SHOWN_LINES:],
        )

    def close(self) -> None:
        """Stop the training, and wait until it has stopped."""
        if self._process is not None:
            self.stop()
            if self._watcher is not None:
                self._watcher.join(2 * PATIENCE_S)

    def _watch(self, wait: Callable[[], None]) -> None:
        self._watcher = threading.Thread(target=wait, name="training", daemon=True)
        self._watcher.start()

    def _wait(self) -> None:
        assert self._process is not None
        self._finish(self._process.wait())

    def _wait_for_other(self) -> None:
        while self._run.busy():
            time.sleep(POLL_S)
        self._finish(0)

    def _finish(self, code: int) -> None:
        with self._lock:
            done = self._run.finished_cycles() >= self._cycle
            stopped = self._state == "stopping"
            state = "finished" if done else "idle" if stopped else "failed"
            self._message = self._reason(code) if state == "failed" else ""
            self._ended = time.monotonic()
            self._process = None
            self._state = state  # last: who sees that it ended, without the lock, also sees how
        if self._message:
            logger.warning("Training %d failed: %s", self._cycle, self._message)
        self._on_change()

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"the training was killed by {signal.Signals(-code).name} (the system does that if memory runs out)"
        lines = self._log()
        errors = [line for line in lines if "error:" in line.lower()]
        return (errors or [line for line in lines if line.strip()] or ["it ended without a word"])[-1].strip()

    def _log(self) -> list[str]:
        try:
            return (self._run.path / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        _signal(process, signal.SIGKILL)


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Tell a training, and the processes that load its images."""
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, number)


class Background:
    """A thread that does `work` when it is asked to; what is asked while it works is done once more, not many times.

    Args:
        work: what is to be done. If it fails, that is logged, and it is done again when it is next asked for.
        name: of the work, for the log.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work, self._name = work, name
        self._asked, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have the work done soon."""
        self._asked.set()

    def close(self) -> None:
        """Let what is being done finish, and do no more."""
        self._closed.set()
        self._asked.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._closed.is_set():
                return
            try:
                self._work()
            except Exception:  # the page goes on without a new ranking, and the next label tries again
                logger.exception("The %s failed", self._name)
