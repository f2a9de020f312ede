"""Training in a separate process: the page stays responsive, and a crash of the training loses nothing."""

import json
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
from anomalymatch.files import storage_errors, write_text

logger = logging.getLogger(__name__)
PROGRAM = (sys.executable, "-m", "anomalymatch.run")
LOG, PROCESS = "training.log", "training.json"
INTERRUPTED = {-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes of a training that was told to stop."""
POLL_S = 0.5
PATIENCE_S = 15.0
"""Time that a training has to stop before it is killed."""
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
    """Status of a training.

    Attributes:
        state: idle, running, stopping, interrupted (from outside), failed or finished.
        cycle: number of the running or last training; 0 before the first.
        step: finished steps.
        steps: total steps; 0 if unknown.
        seconds: time since the start, or total duration.
        losses: values by name, of at most 500 steps.
        message: the reason of a failure in one line; otherwise empty.
        log: the last lines of its output.
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
    """Training of one more cycle of a run folder, by the command `anomalymatch.run resume=RUN`.

    The process outlives a crash of the page; the next page watches it and can stop it. For that, its number and the
    time of its start are in the run folder.

    Args:
        run: the run folder, with its configuration.
        steps: training steps of a cycle; 0 if unknown.
        program: the command without its arguments.
        words: further arguments.
        check: raises a `LabelError` if there is not enough to train on.
        on_change: called when a training starts or ends, from another thread.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        program: Sequence[str] = PROGRAM,
        words: Sequence[str] = (),
        check: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self.program, self._words, self._run, self._steps = program, words, RunReader(run), steps
        self._check, self._on_change = check, on_change
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._earlier: int | None = None
        self._state, self._message, self._cycle = "idle", "", self._run.finished_cycles()
        self._began = self._ended = time.monotonic()
        self._watcher: threading.Thread | None = None
        self._find_earlier()
        if self._earlier is not None or self._run.busy():
            self._state = "running"
            self._cycle += 1
            self._watch(self._wait_for_other)

    @property
    def running(self) -> bool:
        """True while a training runs."""
        return self._state in ("running", "stopping")

    def start(self) -> None:
        """Start a training.

        Raises:
            LabelError: if one is running, or there is not enough to train on.
            StorageError: if its log cannot be written.
        """
        with self._lock:
            if self.running:
                raise LabelError(f"training {self._cycle} is running: wait for it, or stop it")
            self._check()
            self._cycle = self._run.finished_cycles() + 1
            path = self._run.path / LOG
            with storage_errors(path), path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self.program, f"resume={self._run.path}", f"al.cycles={self._cycle}", *self._words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"COLUMNS": "160"},  # the page shows its lines, not a narrow terminal
                    start_new_session=True,  # Ctrl-C in the terminal of the page must not reach it
                )
            pid = self._process.pid
            started = {"pid": pid, "start": _start_of(pid), "time": time.time()}
            write_text(self._run.path / PROCESS, json.dumps(started))
            self._message, self._began, self._state = "", time.monotonic(), "running"
            self._watch(self._wait)
        self._on_change()

    def check(self) -> bool:
        """Return True if a training can start; otherwise raise the `LabelError` of `start`."""
        if self.running:
            raise LabelError(f"training {self._cycle} is running: wait for it, or stop it")
        self._check()
        return True

    def estimate(self) -> float:
        """Estimate the seconds of a training by the last one; NaN before the first."""
        return self._run.seconds(self._run.finished_cycles())

    def stop(self) -> None:
        """Stop the training as Ctrl-C would: finished cycles are kept, and `start` repeats this one.

        Raises:
            StorageError: if another program started the training.
        """
        with self._lock:
            if not self.running:
                return
            pid = self._earlier if self._process is None else self._process.pid
            if pid is None:
                raise StorageError("this training was not started from a page: stop it where it was started")
            self._state, start = "stopping", _start_of(pid)
        self._on_change()  # before the signal, after which the training may end at once
        _signal(pid, start, signal.SIGINT)
        timer = threading.Timer(PATIENCE_S, _signal, [pid, start, signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def status(self) -> TrainingStatus:
        """Return the status."""
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
        """Stop the training and wait for its end."""
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
        while self._run.busy() or self._earlier is not None:
            time.sleep(POLL_S)
            self._find_earlier()
        self._finish(None)

    def _find_earlier(self) -> None:
        """Find the training that an earlier page has started, if it still runs."""
        self._earlier = None
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self._run.path / PROCESS).read_text(encoding="utf-8"))
            pid, start, began = int(saved["pid"]), str(saved["start"]), float(saved["time"])
            if start and _start_of(pid) == start:  # the number may be another program's by now
                self._earlier, self._began = pid, time.monotonic() - (time.time() - began)

    def _finish(self, code: int | None) -> None:
        """Note the end with an exit code; None if it is unknown, which is the case for another page's training."""
        with self._lock:
            done = self._run.finished_cycles() >= self._cycle
            stopped = self._state == "stopping"
            is_interrupted = code in INTERRUPTED or (code is None and not self._errors())
            state = "finished" if done else "idle" if stopped else "interrupted" if is_interrupted else "failed"
            self._message = self._reason(code or 0) if state == "failed" else ""
            self._ended = time.monotonic()
            self._process = None
            self._state = state  # last: a reader without the lock that sees the end also sees the message
        if self._message:
            logger.warning("Training %d failed: %s", self._cycle, self._message)
        self._on_change()

    def _reason(self, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            return f"the training was killed by {name} (the operating system does so when memory runs out)"
        printed = [line.strip() for line in self._log() if line.strip()]
        return (self._errors() or printed or [f"it ended with exit code {code} and no output"])[-1]

    def _errors(self) -> list[str]:
        return [line.strip() for line in self._log() if "error:" in line.lower()]

    def _log(self) -> list[str]:
        try:
            return (self._run.path / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []


def _signal(pid: int, start: str, number: signal.Signals) -> None:
    """Signal a training that started at `start`, and its data loading processes."""
    with suppress(ProcessLookupError):  # it has just ended
        if _start_of(pid) == start:
            os.killpg(pid, number)


def _start_of(pid: int) -> str:
    """Return when a process started, in the words of the operating system; empty if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        state, *numbers = text.rpartition(")")[2].split()
        return "" if state == "Z" else numbers[18]  # a zombie has ended
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class BackgroundTask:
    """Thread that does `work` on request; all requests during one run lead to one further run.

    A failure is logged with `name`, and the next request runs it again.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work, self._name = work, name
        self._requested, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Run the task soon."""
        self._requested.set()

    def close(self, patience: float | None = None) -> None:
        """Finish the current run and stop; wait for `patience` seconds at most."""
        self._closed.set()
        self._requested.set()
        self._thread.join(patience)

    def _loop(self) -> None:
        while True:
            self._requested.wait()
            self._requested.clear()
            if self._closed.is_set():
                return
            try:
                self._work()
            except Exception:  # the page keeps its ranking, and the next label tries again
                logger.exception("The %s failed", self._name)
