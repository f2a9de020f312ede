import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from anomalymatch.active.run_folder import LOCK, RunFolder
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.ui.training import PROCESS, BackgroundTask, Training, _signal

SETUP = """
import os, signal, sys, time
from pathlib import Path
run, cycle = Path(sys.argv[1].removeprefix("resume=")), int(sys.argv[2].removeprefix("al.cycles="))
"""
TRAINS = SETUP + (
    'print("began", flush=True)\n'
    'steps = "".join(f\'{{"cycle": {cycle}, "step": {i}, "loss_lb": {1 / (i + 1)}, "pass_rate": null}}\\n\' '
    "for i in range(1200))\n"
    '(run / "live.jsonl").write_text(steps + "{half a li")\n'
    '(run / "cycles" / f"{cycle:02d}").mkdir(parents=True)\n'
)
WAITS = SETUP + 'print("began", flush=True)\ntime.sleep(60)\n'
STUBBORN = SETUP + 'signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint("began", flush=True)\ntime.sleep(60)\n'
FAILS = SETUP + 'print("some line")\nprint("error: the disk is full")\nsys.exit(1)\n'
PRINTS_NOTHING = SETUP + "sys.exit(3)\n"
IS_KILLED = SETUP + "os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.fixture(autouse=True)
def interruptible():
    """Let trainings be interrupted: programs that a shell starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make(tmp_path):
    made = []

    def training(script, check=lambda: None):
        changes = []
        one = Training(
            tmp_path,
            steps=1200,
            program=(sys.executable, "-c", script),
            check=check,
            on_change=lambda: changes.append(one.status().state),
        )
        one.changes = changes
        made.append(one)
        return one

    yield training
    for one in made:
        one.close()


@pytest.fixture
def ended(wait_for):
    def wait(training):
        wait_for(lambda: not training.running and len(training.changes) > 1)
        return training.status()

    return wait


def test_finished_training(make, ended, tmp_path):
    training = make(TRAINS)
    assert (training.status().state, training.status().cycle) == ("idle", 0)
    RunFolder(tmp_path).close()  # a status does not lock the folder
    training.start()
    status = ended(training)
    assert (status.state, status.cycle, status.step, status.steps) == ("finished", 1, 1200, 1200)
    assert training.changes[-1] == "finished"
    assert status.message == ""
    assert status.log == ["began"]
    assert len(status.losses["labelled loss"]) == 400
    assert status.losses["labelled loss"][0] == 1.0
    assert "pass rate" not in status.losses
    training.start()
    assert ended(training).cycle == 2


FAILURES = [(FAILS, "error: the disk is full"), (PRINTS_NOTHING, "exit code 3"), (IS_KILLED, "killed by SIGKILL")]


@pytest.mark.parametrize(("script", "message"), FAILURES)
def test_failed_training(make, ended, script, message, caplog):
    training = make(script)
    training.start()
    status = ended(training)
    assert status.state == "failed"
    assert message in status.message
    assert message in caplog.text
    training.start()
    assert training.status().message == "" or training.status().state == "failed"
    ended(training)


@pytest.mark.parametrize("script", [WAITS, STUBBORN], ids=["that obeys", "that ignores the signal"])
def test_stopped_training(make, ended, wait_for, monkeypatch, script):
    monkeypatch.setattr("anomalymatch.ui.training.PATIENCE_S", 0.2 if script == STUBBORN else 15)
    training = make(script)
    training.start()
    with pytest.raises(LabelError, match="training 1 is running"):
        training.start()
    wait_for(lambda: training.status().log)
    training.stop()
    status = ended(training)
    assert (status.state, status.message) == ("idle", "")
    assert "stopping" in training.changes
    training.stop()  # no effect


def test_the_check_can_refuse_a_training(make):
    def check():
        raise LabelError("no labels yet")

    training = make(WAITS, check)
    with pytest.raises(LabelError, match="no labels yet"):
        training.start()
    assert training.status().state == "idle"


def test_close_stops_the_training(make):
    training = make(WAITS)
    training.start()
    pid = training._process.pid
    training.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


HOLDS = """
import sys
from pathlib import Path
from filelock import FileLock
lock = FileLock(sys.argv[2])
lock.acquire()
print("began", flush=True)
sys.stdin.read()
(Path(sys.argv[1]) / "cycles" / "01").mkdir(parents=True)
lock.release()
"""


def test_a_training_of_an_earlier_page_is_watched(make, wait_for, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"began\n"
    training = make(WAITS)
    assert (training.status().state, training.status().cycle) == ("running", 1)
    with pytest.raises(LabelError, match="training 1 is running"):
        training.start()
    with pytest.raises(StorageError, match="not started from a page"):
        training.stop()
    other.communicate()
    wait_for(lambda: training.changes)
    assert training.status().state == "finished"


LOCKED = SETUP + (
    "from filelock import FileLock\n"
    'lock = FileLock(run / ".lock")\n'
    "lock.acquire()\n"
    'print("began", flush=True)\n'
    "time.sleep(60)\n"
)


def test_a_training_whose_page_was_killed_can_be_stopped(make, wait_for):
    first = make(LOCKED)
    first.start()
    wait_for(lambda: first.status().log)
    second = make(WAITS)  # the page that is opened next
    assert (second.status().state, second.status().cycle) == ("running", 1)
    assert second.status().seconds == pytest.approx(first.status().seconds, abs=1)
    second.stop()
    wait_for(lambda: not second.running and not first.running)
    assert (second.status().state, second.status().message) == ("idle", "")
    assert first.status().state == "interrupted"  # somebody else has stopped it
    assert make(WAITS).status().state == "idle"


def test_another_program_with_the_same_number_gets_no_signal(make, tmp_path, wait_for):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        (tmp_path / PROCESS).write_text(json.dumps({"pid": stranger.pid, "start": "1", "time": 0.0}))
        training = make(WAITS)
        assert training.status().state == "idle"
        _signal(stranger.pid, "1", signal.SIGKILL)
        assert stranger.poll() is None
        for wrong in ("", "{", '{"pid": "x"}', '{"pid": -1, "start": "", "time": 0}'):
            (tmp_path / PROCESS).write_text(wrong)
            assert make(WAITS).status().state == "idle"
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_is_no_failure(make, ended, wait_for, number, caplog):
    training = make(WAITS)
    training.start()
    wait_for(lambda: training.status().log)
    os.killpg(training._process.pid, number)
    assert (ended(training).state, training.status().message) == ("interrupted", "")
    assert not caplog.records


def test_signals_reach_all_child_processes(make, ended, wait_for):
    training = make(SETUP + 'import subprocess\nsubprocess.run(["sleep", "60"])\n')
    training.start()
    group = training._process.pid
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(group), "sleep"], capture_output=True).returncode == 0)
    training.stop()
    ended(training)
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(group)], capture_output=True).returncode != 0)
    assert training.status().state != "running"


def test_requests_during_a_run_lead_to_one_further_run():
    began, go, count = threading.Semaphore(0), threading.Semaphore(0), []

    def work():
        count.append(1)
        began.release()
        go.acquire()

    background = BackgroundTask(work, "work")
    background.request()
    began.acquire()
    for _ in range(5):
        background.request()
    go.release()
    began.acquire()  # the second run, for all five
    go.release()
    background.close()
    assert len(count) == 2


def test_a_failed_task_is_logged_and_runs_again(caplog):
    done, results = threading.Semaphore(0), [ValueError("broken"), None]

    def work():
        result = results.pop(0)
        done.release()
        if result:
            raise result

    background = BackgroundTask(work, "re-ranking")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            background.request()
            done.acquire()
        background.close()
    assert "The re-ranking failed" in caplog.text
    assert "broken" in caplog.text
    assert results == []
