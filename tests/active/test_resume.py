"""Kill a run at any moment: what resumes it ends with the same numbers as if nothing had happened."""

import multiprocessing
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial

import pytest
from active.killable import IMPORTED, do_job

from anomalymatch.config import compose

SIGKILLED = -signal.SIGKILL
compose_once = lru_cache(compose)


@pytest.fixture
def job(tmp_path):
    """Run the command, or with a folder the function, in a fork; its exit code, its number of writes and its words."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(IMPORTED)

    def run(*words, folder=None, kill_at=0, pictures=False):
        log = tmp_path / "stderr"
        config = folder and compose_once(*words)
        process = forks.Process(target=do_job, args=(words, config, folder, log, kill_at, pictures))
        process.start()
        process.join()
        writes = 0 if process.exitcode == SIGKILLED else int(log.with_suffix(".writes").read_text())
        return process.exitcode, writes, log.read_text()

    return run


def killed_and_resumed(job, words, path, whole, comparable, *, kill_at, command=True, pictures=False):
    code, _, said = job(*words, folder=path, kill_at=kill_at, pictures=pictures)
    assert code == SIGKILLED, said
    resume = {"words": [f"resume={path}"], "folder": None} if command else {"words": words, "folder": path}
    code, _, said = job(*resume["words"], folder=resume["folder"], pictures=pictures)
    assert code == 0, said
    assert comparable(path) == comparable(whole)
    assert (path / "report.html").is_file()
    assert not [p for p in path.rglob("*.part") if p.is_file() and p.parent.name == "cycles"]


@pytest.mark.slow
def test_a_probe_can_be_killed_at_every_write_of_a_cycle(job, probe_job, tmp_path, comparable):
    words = [*probe_job, "al.cycles=1"]
    job(*words, folder=tmp_path / "first")  # the galaxies and their features are written once
    code, writes, said = job(*words, folder=tmp_path / "whole")
    assert code == 0, said
    assert 10 < writes < 25
    for at in range(1, writes + 1):
        path = tmp_path / str(at)
        killed_and_resumed(job, words, path, tmp_path / "whole", comparable, kill_at=at, command=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "cycle"), [("fixmatch", 1), ("fixmatch_reference", 2), ("flexmatch", 3), ("softmatch", 2)]
)
def test_a_training_can_be_killed_in_any_cycle(job, tiny_job, tmp_path, comparable, algorithm, cycle):
    words = [f"algorithm={algorithm}", *tiny_job, "al.cycles=3"]
    code, writes, said = job(*words, folder=tmp_path / "whole")
    assert code == 0, said
    at = {1: 6, 2: writes // 2, 3: writes - 5}[cycle]
    killed_and_resumed(job, words, tmp_path / "run", tmp_path / "whole", comparable, kill_at=at)


@pytest.mark.slow
def test_resume_draws_the_report_of_a_run_killed_meanwhile(job, probe_job, tmp_path, comparable):
    code, writes, said = job(*probe_job, folder=tmp_path / "whole", pictures=True)
    assert code == 0, said
    path = tmp_path / "run"
    killed_and_resumed(job, probe_job, path, tmp_path / "whole", comparable, kill_at=writes, pictures=True)
    assert "2 of 2 cycles" in (path / "report.html").read_text(encoding="utf-8")
    assert {p.name for p in path.glob("plots/*")} == {p.name for p in (tmp_path / "whole").glob("plots/*")}


@pytest.mark.slow
def test_resume_allows_more_cycles_and_refuses_other_changes(job, probe_job, tmp_path, comparable):
    path = tmp_path / "run"
    assert f"error: resume={path}: " in job(f"resume={path}")[2]
    assert job(*probe_job, folder=path)[0] == 0
    assert job(*probe_job, "al.cycles=3", folder=tmp_path / "three")[0] == 0
    for word in ("dataset=cifar10", "+algorithm.learner.optimizer.x=1"):
        code, _, said = job(f"resume={path}", word)
        assert code == 1
        assert [line for line in said.splitlines() if "INFO" not in line] == [said.splitlines()[-1]]
        assert said.splitlines()[-1].startswith("error: ")
    assert "seed=1" in job(f"resume={path}", "seed=1")[2]
    assert job(f"resume={path}", "al.cycles=3", "trainer.workers=0", "logger=none")[0] == 0
    assert comparable(path) == comparable(tmp_path / "three")
    assert job(f"resume={path}")[0] == 0  # and its length is kept
    assert comparable(path) == comparable(tmp_path / "three")


@pytest.mark.slow
def test_the_command_can_be_interrupted_and_resumed(job, tiny_job, tmp_path, comparable):
    words = [*tiny_job, "trainer.iterations=10"]
    assert job(*words, folder=tmp_path / "whole")[0] == 0
    run = tmp_path / "run"
    # Ctrl-C reaches the process also where the tests were started in the background.
    ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "anomalymatch.run", *words, f"hydra.run.dir={run}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ctrl_c)
    until = time.monotonic() + 120
    while not (run / "labels.csv").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    *before, last = err.splitlines()
    assert f"python -m anomalymatch.run resume={run}" in last
    assert not [line for line in before if any(w in line for w in ("Traceback", "Warning", "GPU", "litlogger"))]
    code, _, said = job(f"resume={run}")
    assert code == 0, said
    assert comparable(run) == comparable(tmp_path / "whole")
