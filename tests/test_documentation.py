"""Run what the README and the pages of docs/ show: every command and every Python block, on tiny images.

A command that no test can run says so to the reader in a comment, `# needs a network`; its words are checked, too. So
does a Python block. The tutorials are run as they are, with their outputs compared, by test_tutorials.py.
"""

import csv
import json
import re
import shlex
import shutil
import tomllib
from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from omegaconf import OmegaConf
from pictures import wcs, write_zip
from PIL import Image

import anomalymatch as am
from anomalymatch.__main__ import COMMANDS
from anomalymatch.config import compose_partly
from anomalymatch.data import convert
from anomalymatch.score import expand_data

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if not {"_build", "tutorials", "commands", "configuration"} & set(path.relative_to(ROOT / "docs").parts)
    ),
]
FENCE = re.compile(r"^( *)(`{3,})(\w+)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (\w.*)$", re.MULTILINE)
WORDS = ("run", "label", "score", "cluster", "adapt")
HYDRA = {f"anomalymatch.{name}": "config" if name == "run" else name for name in WORDS}
CHECKED = {"pip", "make", "wandb", "panoptes", "docker", "git", "cd", "sbatch", "cat", "ls", "open"}
"""Programs of others: the words that name something of this repository are checked."""

LIMITS = {
    "al.cycles": 2,
    "al.budget": 4,
    "al.audit": 10,
    "al.initial.anomalies": 3,
    "al.initial.normals": 10,
    "trainer.iterations": 2,
    "top": 30,
    "adapt.epochs": 1,
    "hydra.sweeper.n_trials": 2,
}
"""Largest numbers that a test takes; a smaller one in the command remains."""
TINY = {
    "model.name": "test_efficientnet",
    "model.weights": "none",
    "dataset.image_size": "32",
    "model.image_size": "32",
    "algorithm.learner.batch.labelled": "2",
    "adapt.batch_size": "16",
    "adapt.held_out": "8",
    "adapt.collapse": "0.0",
    "inference.workers": "1",
    "scoring.backend": "torch",
    "scoring.engine": "local",  # Ray's is tested in tests/scoring
    "logger": "none",
}
DEMO = {"dataset.source.count": "150", "dataset.source.size": "32", "dataset.source.rare_fraction": "0.1"}


def blocks(page):
    """Yield the language and the text of each block of code."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield match[3], re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)


def commands(text):
    """Yield the words of each command of a block, and what it needs that a test doesn't have."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            needs = NEEDS.search(line)
            yield words, needs and needs[1]


def module_and_words(words):
    """The module of a command of this package and the words for it; the words of another program as they are."""
    program, *rest = words
    if program == "python" and rest[:1] == ["-m"]:
        program, *rest = rest[1:]
        if program.startswith("anomalymatch."):
            return program, rest
    if program.startswith("anomalymatch-"):
        assert program in PROJECT["scripts"]
        return COMMANDS[program.removeprefix("anomalymatch-")][0], rest
    if program == "anomalymatch" and rest and not rest[0].startswith("-"):
        return COMMANDS[rest[0]][0], rest[1:]
    return None, words


def check_other_program(words):
    """Check the names of this repository in a command of another program."""
    program, *rest = words
    assert program in CHECKED | {"python"}, f"{program}: say how a test checks this program, or what it needs"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    for extras in re.findall(r"anomalymatch\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for word in rest:
        if word.startswith(("conf/", "experiments/", "examples/", "docs/", "tests/")):
            assert (ROOT / word).exists()


def tiny(name, words, cache):
    """Add words that make a command of Hydra small, as far as it has their keys."""
    given = dict(word.partition("=")[::2] for word in words if "=" in word)
    own = Path(words[words.index("--config-dir") + 1]) if "--config-dir" in words else None
    plain = [word for word in words if "=" in word]
    config = compose_partly(plain, multirun="-m" in words, folder=own, name=name).config
    sizes = {} if "resume" in given else TINY | LIMITS | (DEMO if config.dataset.name == "demo" else {})
    if name == "score":  # image size and network are those of the run
        sizes = {key: value for key, value in sizes.items() if key.startswith(("inference", "scoring"))}
    added = [f"data.cache_dir={cache}", *(["ui.port=0", "ui.show=false"] if name == "label" else [])]
    for key, value in sizes.items():
        present = given.get(key) if key.startswith("hydra.") else OmegaConf.select(config, key)
        if key == "model.weights":  # those that a command before has made remain
            value = ",".join(name if "/" in name else "none" for name in given.get(key, "none").split(","))
        if present is not None and not (key in LIMITS and float(present) <= value):
            added.append(f"{key}={value}")
    if "seed" in given:
        added.append("seed=0")
    return [*words, *added]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_job):
    """Folder with what the pages name: images of all kinds, and a run of the demo."""
    folder = tmp_path_factory.mktemp("world")
    images = np.random.default_rng(0).integers(0, 120, (30, 32, 32, 3), dtype=np.uint8)
    images[::3, 8:16, 8:16] = 250
    for name in ("photos", "survey", "fits", "tiles", "bottle/train/good", "bottle/test/good", "bottle/test/crack"):
        (folder / name).mkdir(parents=True)
    labels = "filename,label\n" + "".join(f"{n:03d}.png,{'normal' if n % 3 else 'anomaly'}\n" for n in range(12))
    (folder / "photos" / "labels.csv").write_text(labels)
    (folder / "photos" / "labeled_data.csv").write_text(labels)
    (folder / "fits" / "labels.csv").write_text(labels.replace("png", "fits"))
    kinds = {0: "test/crack", 1: "train/good", 2: "test/good"}
    rows = ["id,ra,dec"]
    tile = np.zeros((200, 240), dtype=np.float32)
    place = wcs(150.0, 2.0, 0.2, shape=tile.shape)
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / "photos" / f"{n:03d}.png")
        Image.fromarray(image).save(folder / "survey" / f"{n:03d}.png")
        Image.fromarray(image).save(folder / "bottle" / kinds[n % 3] / f"{n:03d}.png")
        bands = [fits.ImageHDU(image[..., n % 3] / 10, name=band) for n, band in enumerate("GRIZ")]
        fits.HDUList([fits.PrimaryHDU(), *bands]).writeto(folder / "fits" / f"{n:03d}.fits")
        row, column = divmod(n, 6)
        tile[row * 40 : row * 40 + 32, column * 40 : column * 40 + 32] = image[..., 0]
        sky = place.pixel_to_world(column * 40 + 16, row * 40 + 16)
        rows.append(f"{n},{sky.ra.deg:.7f},{sky.dec.deg:.7f}")
    fits.PrimaryHDU(tile, header=place.to_header()).writeto(folder / "tiles" / "tile.fits")
    (folder / "catalogue.csv").write_text("\n".join(rows) + "\n")
    files = sorted((folder / "photos").glob("*.png"))
    write_zip(folder / "archive.zip", {file.name: file.read_bytes() for file in files})
    with h5py.File(folder / "unlabeled_file_part1.hdf5", "w") as file:
        file["images"] = images
    (folder / "label-studio-export.json").write_text(
        '[{"data": {"filename": "1.png"}, "annotations": [{"result": [{"value": {"choices": ["anomaly"]}}]}]}]'
    )
    with (folder / "classifications.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject_data", "annotations"])
        writer.writerow([json.dumps({"7": {"filename": "1.png"}}), json.dumps([{"value": "Yes"}])])
    shutil.copytree(ROOT / "examples", folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert.main(["photos", "shards", "--size", "256"])
        job = [word for word in tiny_job if not word.startswith("algorithm")]
        am.run("algorithm=probe", *job, "al.initial.anomalies=6", "al.cycles=1", folder="runs/mine")
    return folder


@pytest.fixture
def workplace(world, tmp_path, monkeypatch):
    """Fill the working directory with a copy of the world."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.syspath_prepend(tmp_path / "world")  # as `python -m` does
    return tmp_path / "world"


@pytest.fixture
def small_interface(monkeypatch, tiny_job, tiny_model):
    """Make the Python interface small: few and small galaxies, a tiny network, few labels."""
    data = [word for word in tiny_job if word.startswith(("dataset.source.", "data."))]
    real = {name: getattr(am, name) for name in ("open_task", "make_learner", "initial_labels")}
    sizes = {"anomalies": 3, "normals": 20}

    def open_task(name, *words):
        return real["open_task"](name, *words, *(data if name == "demo" else data[-1:]))

    monkeypatch.setattr(am, "open_task", open_task)
    monkeypatch.setattr(am, "make_learner", lambda *words: real["make_learner"](*words, *tiny_model))
    monkeypatch.setattr(am, "initial_labels", lambda task, **given: real["initial_labels"](task, **given | sizes))


def pages(kind):
    """Parametrize by the pages that have such blocks."""
    found = [page for page in PAGES if any(language == kind for language, _ in blocks(page))]
    return pytest.mark.parametrize("page", found, ids=[str(page.relative_to(ROOT)) for page in found])


@pages("bash")
def test_the_commands_of_a_page_run_in_their_order(page, workplace, call_main, monkeypatch, without_pictures):
    monkeypatch.setattr("anomalymatch.ui.web.app.serve", lambda service, site, **options: service.preparation.wait())
    every = [command for language, text in blocks(page) if language == "bash" for command in commands(text)]
    for words, needs in every:
        module, rest = module_and_words(words)
        name = HYDRA.get(module)
        if module is None:
            check_other_program(words)
            continue
        if name is not None:
            rest = [expand_data(word.replace("$SLURM_ARRAY_TASK_ID", "3")) for word in rest]
            rest = [word for word in rest if not word.startswith("hydra/launcher=")]  # processes take long to start
            rest = tiny(name, rest, workplace / "cache")
        if not needs and "hydra/sweeper=optuna" not in rest:  # which tests/test_cli.py runs in a process of its own
            outcome = call_main(import_module(module).main, *rest)
            assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.err}"


@pages("python")
def test_the_python_of_a_page_runs(page, workplace, small_interface, capsys):
    names = {"__name__": "page"}
    for block in (text for language, text in blocks(page) if language == "python"):
        code = compile(block, str(page), "exec")
        if not NEEDS.search(block):
            exec(code, names)


def test_the_readme_is_short_and_its_links_and_choices_exist():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_named_choices_exist():
    choice = re.compile(r"\b(dataset|algorithm|oracle|logger)=(\w+)")
    chosen = {
        pair for page in PAGES for pair in choice.findall(page.read_text(encoding="utf-8")) if not pair[1].isupper()
    }
    assert len(chosen) > 20
    places = (ROOT / "conf", ROOT / "examples" / "mine" / "conf")
    assert [
        pair for pair in chosen if not any((place / pair[0] / f"{pair[1]}.yaml").is_file() for place in places)
    ] == []
