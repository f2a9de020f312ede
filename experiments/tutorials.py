"""Run the tutorials, and write the outputs and pictures that they show: `python experiments/tutorials.py`.

A tutorial is a page of docs/tutorials. Its `bash` and `python` blocks run in their order in an empty folder, and a
`text` block right after one is its output. tests/test_tutorials.py runs them, too, and compares the outputs. The
notebooks to download are made of the same blocks when the site is built. The pictures of the labelling page need
Playwright and Chromium.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
PICTURES = ROOT / "docs" / "images" / "tutorials"
FENCE = re.compile(r"^```(bash|python|text)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
BY_HAND = {"pip", "open"}
"""Programs that only the reader starts."""
TIME = re.compile(r"^(\[\d\d:\d\d:\d\d\]| {10}) (INFO|WARNING) +")
PROGRESS = re.compile(r".+: \d+/\d+, .*/s, ")
HOME = "/home/ada"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
RANK, IMAGE = re.compile(r"\s*\d+[ ,]"), re.compile(r"(?<=[a-z])-\d{3,}")
"""Start of a row of a ranking, and number of an image in its name."""
TOLERANCE, RELATIVE = 0.02, 0.05
"""Differences between machines that are allowed."""


class Block(NamedTuple):
    """Block of code of a page, and its output as far as the page shows it.

    Attributes:
        language: bash or python.
        code: what to run.
        shown: the output in the page, or None.
        span: place of the output in the page, without the fence.
    """

    language: str
    code: str
    shown: str | None
    span: tuple[int, int]


def pages() -> list[Path]:
    """Return the tutorials."""
    return sorted(path for path in TUTORIALS.glob("*.md") if path.name != "index.md")


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page."""
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        if match[1] != "text":
            found.append(Block(match[1], match[2], None, (0, 0)))
        elif found and not text[end : match.start()].strip():
            found[-1] = found[-1]._replace(shown=match[2], span=match.span(2))
        end = match.end()
    return found


def run_page(page: Path, command: Callable[..., str]) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page in the working directory, and yield each with its output.

    Args:
        page: the tutorial.
        command: function that runs the words of `anomalymatch` and returns what they print.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, str(page), "exec"), names)
            yield block, printed.getvalue()
            continue
        said = []
        for line in block.code.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True) or ["pip"]
            if program == "anomalymatch":
                said.append(command(*words))
            elif program not in BY_HAND:
                said.append(subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout)
        yield block, tidy("".join(said))


def tidy(text: str) -> str:
    """Remove what differs from one day to the next: times of log lines, progress, the working directory."""
    lines = (TIME.sub("", line).rstrip() for line in text.replace(str(Path.cwd()), HOME).splitlines())
    return "".join(f"{line}\n" for line in lines if line and not PROGRESS.match(line))


def differences(shown: str, found: str) -> list[tuple[str, str]]:
    """Return the lines that differ by more than numbers do between machines, and by more than their times."""
    pairs = []
    seconds = False
    for one, other in zip_longest(shown.splitlines(), found.splitlines(), fillvalue=""):
        # In a row of a ranking, another machine may swap images with nearly the same score.
        words, others = (IMAGE.sub("-", line).split() if RANK.match(line) else line.split() for line in (one, other))
        is_row = (len(words) > 1 and words[0].isdigit()) or one.lstrip().startswith("─")
        seconds = words[-1:] == ["s"] or (seconds and is_row)  # the last column of a table
        if seconds and len(words) == len(others):
            words, others = words[:-1], others[:-1]
        if len(words) != len(others) or not all(map(_alike, words, others)):
            pairs.append((one, other))
    return pairs


def _alike(one: str, other: str) -> bool:
    numbers, others = ([float(text.replace(",", "")) for text in NUMBER.findall(word)] for word in (one, other))
    if NUMBER.sub("0", one) != NUMBER.sub("0", other) or len(numbers) != len(others):
        return False
    return all(abs(a - b) <= TOLERANCE + RELATIVE * abs(a) for a, b in zip(numbers, others, strict=True))


def notebook(page: Path) -> dict[str, Any]:
    """Convert a tutorial to a notebook: commands become cells that begin with `!`; pictures and links are left out."""
    text = page.read_text(encoding="utf-8")
    cells: list[dict[str, Any]] = []
    end = 0
    for match in FENCE.finditer(text):
        _add_text(cells, text[end : match.start()])
        end = match.end()
        if match[1] != "text":
            code = match[2] if match[1] == "python" else re.sub(r"^(?=\S)(?!#)", "!", match[2], flags=re.MULTILINE)
            cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
            cells.append({**cell, "source": code.strip().splitlines(keepends=True)})
    _add_text(cells, text[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    plain = re.sub(r"^(!\[.*|:::.*|\{.*)\n", "", text, flags=re.MULTILINE)
    plain = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", plain).strip()
    if plain:
        cells.append({"cell_type": "markdown", "metadata": {}, "source": plain.splitlines(keepends=True)})


def write_notebooks(folder: Path) -> None:
    """Write the notebooks that the site offers."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages():
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False)
        (folder / f"{page.stem}.ipynb").write_text(text + "\n", encoding="utf-8")


LABELS = (40, 20, 20)
"""Labels that a reader gives before each new order."""


def odd_ones() -> set[str]:
    """Return the files of docs/tutorials/odd-ones-in-a-folder.md that a reader would call odd."""
    import anomalymatch as am

    words = ("dataset.source.count=500", "dataset.source.rare=merger", "dataset.source.rare_fraction=0.06")
    task = am.open_task("demo", *words)
    return {f"galaxy-{n:03d}.png" for n, id_ in enumerate(task.source.ids) if id_ in (task.anomalies or ())}


def visit(words: list[str]) -> None:
    """Start the labelling page in a browser, label as a reader does, and take the pictures."""
    from labelling_page import browser, open_page, server, settled

    odd = odd_ones()
    with server(words, Path("runs/label-photos")) as url, browser() as chromium:
        page = open_page(chromium, url, "light", viewport={"width": 1200, "height": 760})
        page.locator("[data-testid=preparation]").wait_for(state="hidden", timeout=600_000)
        take_new_order(page)
        picture(settled(page).screenshot(), "page_start.jpg")
        for count in LABELS:
            for _ in range(count):
                tile = page.locator("[data-testid=tile].am-cursor")
                id_ = tile.get_attribute("data-id") or ""
                page.keyboard.press("a" if id_ in odd else "n")
                page.wait_for_function("id => document.querySelector(`[data-id='${id}']`)?.dataset.label", arg=id_)
            take_new_order(page)
        picture(settled(page).screenshot(), "page_ranked.jpg")
        page.keyboard.press("Space")
        page.locator("[data-testid=viewer]").wait_for()
        picture(settled(page).screenshot(), "page_large.jpg")


def take_new_order(page: Any) -> None:
    """Press `r` until the order is that of all labels."""
    offer = page.locator("[data-testid=new-order]")
    page.wait_for_timeout(4000)  # the ranking follows the last label
    page.keyboard.press("r")
    page.wait_for_timeout(4000)
    while offer.is_visible():
        page.keyboard.press("r")
        page.wait_for_timeout(4000)
    page.keyboard.press("Home")


def picture(data: bytes | Path, name: str, width: int = 1200) -> None:
    """Save a picture for a page as a JPEG."""
    from PIL import Image

    image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)))
    PICTURES.mkdir(parents=True, exist_ok=True)
    image.save(PICTURES / name, quality=80, optimize=True)


FROM_FILES: Mapping[str, str] = {
    "runs/lenses/cycles/03/top64.png": "lenses_top.jpg",
    "runs/lenses/plots/discovery.png": "lenses_discovery.jpg",
    "runs/lenses/cycles/03/top_evidence.png": "lenses_evidence.jpg",
    "galaxies.png": "python_galaxies.jpg",
    "top.png": "python_top.jpg",
    "search.png": "python_search.jpg",
}
"""Pictures that the tutorials write, and their names in docs/images/tutorials."""


def in_a_process(*words: str) -> str:
    """Run a command of anomalymatch, and return what it prints."""
    if words[0] == "label":
        visit(list(words[1:]))
        return ""
    done = subprocess.run([sys.executable, "-m", "anomalymatch", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"anomalymatch {shlex.join(words)}\n{done.stderr}")
    return done.stderr + done.stdout


def main() -> None:
    """Run the tutorials that the command line names, all by default, and write their outputs and pictures."""
    for page in [TUTORIALS / f"{name}.md" for name in sys.argv[1:]] or pages():
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            results, missing = [], dict(FROM_FILES)
            for result in run_page(page, in_a_process):
                results.append(result)
                # At once: a later block may write the file again.
                for file in [file for file in missing if Path(file).is_file()]:
                    picture(Path(file), missing.pop(file))
        for block, output in reversed(results):
            if block.shown is not None:
                text = text[: block.span[0]] + output + text[block.span[1] :]
        page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(results)} blocks")


if __name__ == "__main__":
    main()
