"""Do what the command does, and kill the process at a given write; `test_resume.py` calls this in forks."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from anomalymatch import run
from anomalymatch.active import loop
from anomalymatch.files import write_text

IMPORTED = ["anomalymatch.build", "anomalymatch.evaluation", "anomalymatch.sweep", "anomalymatch.data.sources.demo"]
"""Modules that take long to import: the server of the forks imports them once."""


def kill_at_write(at: int) -> list[str]:
    """Kill this process just before the file number `at` appears, by a rename; return the files that appeared."""
    real, written = os.replace, []

    def replace(source: str, target: str) -> None:
        written.append(str(target))
        if len(written) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    return written


def do_job(words: list[str], config: Any, folder: Path | None, stderr: Path, kill_at: int, pictures: bool) -> None:
    """Call the command with `words`, or with a folder its function with `config`, and write the number of its files."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    written = kill_at_write(kill_at)
    if not pictures:  # one small file instead of the report, so that there is a write that can be killed
        loop.RunReport.write = lambda report: write_text(report.folder.path / "report.html", "report")
        loop.write_sheets = lambda *args: None
    sys.argv = ["anomalymatch", *words]
    code = 0
    try:
        run.main() if folder is None else run.execute(config, folder)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    stderr.with_suffix(".writes").write_text(str(len(written)))
    os._exit(code)
