"""Runs the command in forks of a process that has imported everything, and kills them at a given write.

Each line on stdin is a job; its exit code and number of writes come back on stdout. Not a test: `test_resume.py` starts
it, because a process of its own takes ten seconds to import and a fork takes none.
"""

import json
import os
import signal
import sys
import traceback
from functools import lru_cache
from pathlib import Path

import timm

from anomalymatch import run, sweep
from anomalymatch.active import loop
from anomalymatch.build import compose
from anomalymatch.data.sources.demo import VERSION
from anomalymatch.files import write_text

# What takes long and can be done once for all forks.
timm.list_models()
sweep.summarise(Path("nowhere"))
assert VERSION
compose_once = lru_cache(compose)
WRITES = 0


def count_and_kill(at: int) -> None:
    """Every file appears by a rename: count them, and kill this process just before number `at`."""
    real = os.replace

    def replace(source: str, target: str) -> None:
        global WRITES
        WRITES += 1
        if at == WRITES:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace


def without_pictures() -> None:
    """One small file instead of the report, so that there is a write that can be killed."""
    loop.RunReport.write = lambda report: write_text(report.folder.path / "report.html", "report")
    loop.write_sheets = lambda *args: None


def job(words: list[str], folder: str | None, stderr: str, kill_at: int, pictures: bool) -> None:
    """Do what the command does (or, with a folder, the function) and say how many files were written."""
    file = os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 2)
    count_and_kill(kill_at)
    if not pictures:
        without_pictures()
    sys.argv = ["anomalymatch", *words]
    code = 0
    try:
        if folder is None:
            run.main()
        else:
            run.execute(compose_once(*words), Path(folder))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    Path(f"{stderr}.writes").write_text(str(WRITES))
    os._exit(code)


for line in sys.stdin:
    order = json.loads(line)
    if order["folder"] is not None:
        compose_once(*order["words"])
    pid = os.fork()
    if pid == 0:
        job(**order)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
