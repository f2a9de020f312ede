"""Golden test: small runs on the rendered galaxies give the numbers and files that are stored in golden.json.

It uses the public functions and the files that they write, nothing else, so it stays valid while modules move. After an
intended change of numbers or files, write golden.json again and review its diff:

    GOLDEN=write python -m pytest -n 0 tests/test_golden.py

Each entry names the machine that wrote it. On such a machine, numbers must agree to 1e-6. Elsewhere they are rounded
differently, and `msc` amplifies that through its half-precision features: with AVX2 instead of AVX-512 its scores move
by up to 3e-3, and its AUROC by 1e-2. So the tolerance there is 5e-2, and at least eight of the ten top-ranked images
must be the same.
"""

import json
import os
import platform
import re
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import sklearn
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

import anomalymatch as am

GOLDEN = Path(__file__).with_name("golden.json")
INFERENCE = "inference.device=cpu inference.precision=fp32 inference.backend=torch inference.workers=1"
TINY = "model.name=test_efficientnet model.weights=none dataset.image_size=32"
DEMO = "dataset=demo dataset.source.count=150 dataset.source.size=32 dataset.source.rare_fraction=0.1"
LOOP = "al.cycles=2 al.initial.anomalies=3 al.initial.normals=10 al.budget=4 trainer.lightning.accelerator=cpu"
OWN = {
    "fixmatch": "trainer.iterations=4 algorithm.learner.batch.labelled=4 algorithm.learner.guard=warn",
    "msc": "algorithm.learner.batch_size=16",
}
"""Settings of one algorithm. With `guard=fallback` so short a training would keep the ranking of the probe."""
CHECKPOINTS = ("weights.json", "novelty.json")
"""Contents are left out, as those of config.yaml are: they name classes."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums have the same order on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, cache_dir):
    """Function that runs two cycles of an algorithm, once, and returns the run folder."""

    @cache
    def run(algorithm):
        folder = tmp_path_factory.mktemp("runs") / algorithm
        words = f"{DEMO} {TINY} {INFERENCE} {LOOP} algorithm={algorithm} {OWN.get(algorithm, '')} logger=none".split()
        am.run(*words, cache_dir, folder=folder)
        return folder

    return run


@pytest.mark.parametrize("algorithm", ["probe", "fixmatch", "knn", "msc"])
def test_run(algorithm, run_folder):
    check(f"run {algorithm}", summarise(run_folder(algorithm)))


def test_score(run_folder, tmp_path, cache_dir):
    words = "dataset.source.count=60 dataset.source.size=32 dataset.source.rare_fraction=0.1 dataset.source.seed=1"
    source = am.open_task("demo", *words.split(), cache_dir).source
    (tmp_path / "archive").mkdir()
    for id_, pixels in zip(source.ids, source.read(source.ids), strict=True):
        Image.fromarray(pixels).save(tmp_path / "archive" / f"{id_}.png")
    (tmp_path / "archive" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    given = (f"run={run_folder('fixmatch')}", f"data.root={tmp_path / 'archive'}", f"output={tmp_path / 'scores'}")
    settings = f"scoring.backend=torch scoring.batch_size=16 scoring.top=20 scoring.features=true {INFERENCE}"
    check("score", summarise(am.score(*given, cache_dir, *settings.split())))


def test_cluster(run_folder, tmp_path, cache_dir):
    given = (f"run={run_folder('fixmatch')}", f"output={tmp_path / 'groups'}", "top=60", "logger=none")
    patches = "clustering.patches.levels=[2,3] clustering.patches.components=6 clustering.spec.most_groups=6"
    check("cluster", summarise(am.cluster(*given, cache_dir, *f"{TINY} {INFERENCE} {patches}".split())))


@pytest.mark.parametrize("algorithm", ["probe", "fixmatch"])
def test_learner_on_pretrained_weights(algorithm, cache_dir):
    task = am.open_task("demo", "dataset.source.count=60", "dataset.source.rare_fraction=0.2", cache_dir)
    labels = am.initial_labels(task, anomalies=3, normals=10, seed=0)
    words = f"model.weights=bundled trainer.lightning.accelerator=cpu {INFERENCE} {OWN.get(algorithm, '')}".split()
    learner = am.make_learner(algorithm, task, *words, cache_dir)
    learner.fit(labels, pool=task.pool)
    ranking = learner.rank(task.source.ids)
    metrics = am.evaluate(ranking.restrict(task.holdout), task).as_dict()
    found = summarise_table(pa.table({"id": ranking.ids, "logit": ranking.logits}))
    check(f"learner {algorithm}", {"ranking": found, "metrics": metrics})


def summarise(folder):
    """Summarise the files of a folder: their names, the columns and numbers of tables, the keys of JSON files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = {"files": [path.relative_to(folder).as_posix() for path in paths]}
    for path, name in zip(paths, found["files"], strict=True):
        if path.suffix == ".parquet":
            found[name] = summarise_table(pq.read_table(path))
        elif path.suffix == ".csv":  # without training, steps.csv has a blank line alone
            found[name] = summarise_table(pa.csv.read_csv(path)) if path.read_text().strip() else None
        elif path.suffix == ".json" and path.name not in CHECKPOINTS:
            found[name] = sorted(json.loads(path.read_text(encoding="utf-8")))
    return found


def summarise_table(table):
    """Summarise a table: types, some rows (sorted by id), mean and deviation of scores, and the top-ranked images."""
    found = {"types": {field.name: re.sub("<.*", "", str(field.type)) for field in table.schema}}
    kept = [name for name in table.column_names if name not in ("seconds", "reason")]  # times and prose
    rows = [list(row.values()) for row in table.select(kept).to_pylist()]
    if "id" in kept:
        rows.sort(key=lambda row: row[kept.index("id")])
    found["count"] = len(rows)
    found["rows"] = rows if len(rows) < 7 else rows[:3] + rows[-3:]
    for name in {"logit", "distance", "best_weight"} & set(kept):
        values = table[name].to_numpy()
        found[name] = [float(np.mean(values, dtype=float)), float(np.std(values, dtype=float))]
    if {"id", "logit"} <= set(kept):
        found["top"] = table.sort_by([("logit", "descending"), ("id", "ascending")])["id"].to_pylist()[:10]
    return found


def machine():
    """Return the processor and the library versions, on which rounding depends."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    model = re.findall(r"^(?:vendor_id|cpu family|model)\s*: (.*)", info, re.MULTILINE)[:3]
    versions = (torch.__version__, np.__version__, sklearn.__version__)
    return [torch.backends.cpu.get_cpu_capability(), platform.machine(), " ".join(model), *map(str, versions)]


def check(name, found):
    """Compare with the entry of golden.json, or write it."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    text = re.sub('(?<=-)[0-9a-f]{8}(?=")', "HASH", json.dumps(found))  # of the weights, behind the name of a run
    text = text.replace("NaN", "null")  # which JSON does not know
    found = {"machine": machine(), **json.loads(text)}
    if os.environ.get("GOLDEN") == "write":
        entries = [
            f"{json.dumps(key)}: {{\n"
            + ",\n".join(f"{json.dumps(part)}: {json.dumps(value)}" for part, value in entry.items())
            + "\n}"
            for key, entry in sorted((golden | {name: found}).items())
        ]
        GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
        return
    same = golden[name].pop("machine") == found.pop("machine")
    different = list(differences(found, golden[name], name, same))
    assert not different, "\n".join(different)


def differences(found, expected, where, same):
    """Yield one line for each value that differs by more than the tolerance."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        for key in expected:
            yield from differences(found[key], expected[key], f"{where}: {key}", same)
    elif where.endswith(": top") and not same:
        if len(set(found) & set(expected)) < 8:
            yield f"{where}: {found}, expected {expected}"
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from differences(*pair, f"{where} {number}", same)
    elif isinstance(expected, int | float) and isinstance(found, int | float):
        tolerance = 1e-6 if same else 5e-2
        rounding = 2 if isinstance(expected, int) and not same else tolerance  # neighbours swap their ranks
        if found != pytest.approx(expected, rel=tolerance, abs=rounding):
            yield f"{where}: {found}, expected {expected}"
    elif found != expected:
        yield f"{where}: {found}, expected {expected}"
