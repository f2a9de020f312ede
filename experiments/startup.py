"""Measure how long the commands take to start, as whole processes beside `python -c "import torch"` (README, 20).

Every round runs each command once, so that a slow moment of the machine affects all. Processor time is that of the
process and of those it waited for.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import Row, make_parser, markdown, parse_options, write_csv
from PIL import Image

from anomalymatch import open_task, run
from anomalymatch.types import Reject

REFERENCE = "import torch"
SMALLEST = ("model.name=test_efficientnet", "model.weights=none", "model.stages=false", "model.image_size=32")
KEYS = ("seconds", "processor")
Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Command:
    """Command to measure.

    Attributes:
        words: arguments of the interpreter; {out} is a new folder, and {cache} a new cache.
        until: function that returns when enough has come of it, after which it is killed; None waits for its end.
        bar: seconds that it should take at most on an idle machine with two cores.
        fails: True if the command ends with an error, as it should.
    """

    words: tuple[str, ...]
    bar: float | None = None
    until: Callable[[Process], None] | None = None
    fails: bool = False


def main() -> None:
    """Measure the commands in turn and print the table."""
    parser = make_parser(__doc__, quick="one round, without the demo run, on 64 images with the smallest network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="measure these only, beside the reference")
    options = parse_options(parser)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        commands = prepare(work, quick=options.quick)
        wanted = [REFERENCE, *(options.only or commands)]
        unknown = set(wanted) - set(commands)
        if unknown:
            parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(commands)}")
        for turn in range(1 if options.quick else options.rounds):
            for what in dict.fromkeys(wanted):
                rows.append({"what": what, "round": turn, **measure(commands[what], work)})
            write_csv(options.results / "startup.csv", rows)
    print(summary(rows, {what: command.bar for what, command in commands.items()}))


def prepare(work: Path, *, quick: bool) -> dict[str, Command]:
    """Write a folder of images and a trained run; return the commands that are measured, by name."""
    count, network = (64, SMALLEST) if quick else (1000, ())
    source = open_task("demo", f"dataset.source.count={count}", f"data.cache_dir={work / 'cache'}").source
    (work / "images").mkdir()
    for id_, image in zip(source.ids, source.read(source.ids), strict=True):
        assert not isinstance(image, Reject)
        Image.fromarray(image).save(work / "images" / f"{id_}.jpg", quality=90)
    words = ("dataset=demo", f"dataset.source.count={count}", "dataset.source.rare_fraction=0.1", *network)
    few = ("al.cycles=1", "al.initial.anomalies=2", "al.initial.normals=5")
    run(*words, *few, "algorithm=probe", "logger=none", folder=work / "run")
    module, images = ("-m", "anomalymatch"), f"data.root={work / 'images'}"
    page = (*module, "label", "dataset=folder", images, *network, "ui.run={out}/run", "ui.port=0", "ui.show=false")
    first = next(iter(source.ids))

    def first_picture(process: Process) -> None:
        address = first_line(process, holding=": http").split()[-1]  # the page; a log line tells it before
        for path in ("", f"thumb?id={first}.jpg&side=192&v=1"):
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                answer.read()

    commands = {
        REFERENCE: Command(("-c", "import torch")),
        "import anomalymatch": Command(("-c", "import anomalymatch"), bar=0.3),
        "run --help": Command((*module, "run", "--help"), bar=1.5),
        "run, first line": Command((*module, "run", *words), bar=1.0, until=first_line),
        "run, wrong data.root": Command((*module, "run", "dataset=folder", "data.root=nowhere"), fails=True),
        "page, first picture": Command(page, bar=10.0, until=first_picture),
        "score": Command((*module, "score", f"run={work / 'run'}", images, "output={out}/scores"), bar=12.0),
    }
    if not quick:
        commands["make run"] = Command((*module, "run", "+experiment=demo_quick"), bar=90.0)
    return commands


def first_line(process: Process, holding: str = "") -> str:
    """Return the next line of output that holds a word.

    Raises:
        RuntimeError: if the process ends without one.
    """
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        if line.strip() and holding in line:
            return line
        seen.append(line)
    raise RuntimeError(f"no line came of {process.args}: {''.join(seen)}")


def measure(command: Command, work: Path) -> Row:
    """Run a command once in a new folder; return its seconds on the clock and of processor time.

    Raises:
        RuntimeError: if it ends with an error, or without the error that it should give.
    """
    with tempfile.TemporaryDirectory(dir=work) as out, (Path(out) / "output.txt").open("w+") as said:
        words = [word.replace("{out}", out) for word in command.words]
        environment: Mapping[str, str] = {**os.environ, "ANOMALYMATCH_CACHE": f"{out}/cache"}
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=out,
            env=environment,
            stdout=said if command.until is None else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            if command.until is not None:
                command.until(process)
        finally:
            if command.until is not None:
                os.kill(process.pid, signal.SIGKILL)  # `process.kill` would wait for it, if it has ended
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            if process.stdout is not None:
                process.stdout.close()
        if command.until is None and (process.returncode != 0) != command.fails:
            said.seek(0)
            raise RuntimeError(f"{words} ended with {process.returncode}: {said.read()}")
    return {"seconds": round(seconds, 3), "processor": round(usage.ru_utime + usage.ru_stime, 3)}


def summary(rows: list[Row], bars: Mapping[str, float | None]) -> str:
    """Format medians, their ratios to the reference, and the bars as a Markdown table."""
    medians = {
        what: [statistics.median(float(row[key]) for row in rows if row["what"] == what) for key in KEYS]
        for what in dict.fromkeys(str(row["what"]) for row in rows)
    }
    lines = [
        [
            what,
            *(f"{value:.2f}" for value in values),
            *(f"{value / medians[REFERENCE][i]:.2f}" for i, value in enumerate(values)),
            "" if bars[what] is None else f"{bars[what]:g}",
        ]
        for what, values in medians.items()
    ]
    return markdown(["what", "seconds", "processor", "ratio", "ratio, processor", "bar, s"], lines)


if __name__ == "__main__":
    main()
