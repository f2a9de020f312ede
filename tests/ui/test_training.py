import os
import subprocess
import sys
import time

import pytest

from anomalymatch.active.run_folder import RunFolder
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.ui.training import Training

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
SAYS_NOTHING = SETUP + "sys.exit(3)\n"
IS_KILLED = SETUP + "os.kill(os.getpid(), signal.SIGKILL)\n"


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


def wait_for(condition, seconds=30):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.01)


def ended(training):
    wait_for(lambda: not training.running and len(training.changes) > 1)
    return training.status()


def test_a_training_that_ends_well(make):
    training = make(TRAINS)
    assert training.status().state == "idle"
    assert training.status().cycle == 0
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


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (FAILS, "error: the disk is full"),
        (SAYS_NOTHING, "it ended without a word"),
        (IS_KILLED, "killed by SIGKILL"),
    ],
)
def test_a_crash_is_told_in_one_line_and_the_next_training_can_begin(make, script, message, caplog):
    training = make(script)
    training.start()
    status = ended(training)
    assert status.state == "failed"
    assert message in status.message
    assert message in caplog.text
    training.start()
    assert training.status().message == "" or training.status().state == "failed"
    ended(training)


def test_who_sees_that_a_training_failed_sees_why(make, monkeypatch):
    reason = Training._reason

    def slow(one, code):
        time.sleep(0.3)
        return reason(one, code)

    monkeypatch.setattr(Training, "_reason", slow)
    training = make(FAILS)
    training.start()
    wait_for(lambda: not training.running)
    assert training.status().message == "error: the disk is full"
    assert training.status().seconds > 0


def test_stopping_is_no_failure(make):
    training = make(WAITS)
    training.start()
    wait_for(lambda: training.status().log)
    training.stop()
    status = ended(training)
    assert status.state == "idle"
    assert status.message == ""
    training.stop()  # nothing to stop


def test_one_that_does_not_listen_is_killed(make, monkeypatch):
    monkeypatch.setattr("anomalymatch.ui.training.PATIENCE_S", 0.2)
    training = make(STUBBORN)
    training.start()
    wait_for(lambda: training.status().log)
    training.stop()
    assert training.status().state == "stopping"
    assert ended(training).state == "idle"


def test_there_is_one_training_at_a_time(make):
    training = make(WAITS)
    training.start()
    with pytest.raises(LabelError, match="a training goes on"):
        training.start()


def test_nothing_begins_if_there_is_nothing_to_train_on(make):
    def check():
        raise LabelError("no labels yet")

    training = make(WAITS, check)
    with pytest.raises(LabelError, match="no labels yet"):
        training.start()
    assert training.status().state == "idle"


def test_closing_the_page_stops_its_training(make):
    training = make(WAITS)
    training.start()
    pid = training._process.pid
    training.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


HOLDS = """
import sys, time
from pathlib import Path
from anomalymatch.active.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("began", flush=True)
sys.stdin.read()
(folder.cycle(1)).mkdir(parents=True)
folder.close()
"""


def test_a_training_that_outlived_the_page_is_watched(make, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"began\n"
    training = make(WAITS)
    assert training.status().state == "running"
    assert training.status().cycle == 1
    with pytest.raises(LabelError, match="a training goes on"):
        training.start()
    with pytest.raises(StorageError, match="not started from here"):
        training.stop()
    other.communicate()
    wait_for(lambda: training.changes)
    assert training.status().state == "finished"


def test_looking_whether_a_run_is_busy_disturbs_nobody(make, tmp_path):
    training = make(WAITS)
    assert training.status().state == "idle"
    RunFolder(tmp_path).close()


def test_signals_reach_the_whole_group(make):
    training = make(SETUP + 'import subprocess\nsubprocess.run(["sleep", "60"])\n')
    training.start()
    group = training._process.pid
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(group), "sleep"], capture_output=True).returncode == 0)
    training.stop()
    ended(training)
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(group)], capture_output=True).returncode != 0)
