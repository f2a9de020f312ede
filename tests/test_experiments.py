import csv
import importlib
import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import result_plots
from networks import network_of
from omegaconf import OmegaConf
from PIL import Image
from probes import SELF_TRAINING
from scipy.linalg import fractional_matrix_power
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from tiny_clip import write_tiny_clip

from anomalymatch.algorithms.probe.regression import fit_logistic, self_train
from anomalymatch.backbones.features import Features, Scaling, Shard
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.backbones.stages import count_equal_stages
from anomalymatch.config import check_overrides, compose, config_folder
from anomalymatch.evaluation.confidence import Interval

FOLDER = config_folder() / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROOT = Path(__file__).parents[1]
needs_openvino = pytest.mark.skipif(not has_openvino(), reason="needs OpenVINO")


def real_data(test):
    """Mark a test that needs real images."""
    skip = pytest.mark.skipif("ANOMALYMATCH_DATA" not in os.environ, reason="ANOMALYMATCH_DATA is not set")
    return pytest.mark.realdata(skip(test))


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_and_its_proposed_sweeps_compose(name):
    config = compose(f"+experiment={name}")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for group, choice in re.findall(r"override /(\w+): (\w+)", text):
        assert config[group].name == choice
    own = OmegaConf.load(FOLDER / f"{name}.yaml")
    del own["defaults"]
    assert OmegaConf.merge(config, own) == config
    for words in re.findall(r"^# .*: -m (.+)$", text, flags=re.MULTILINE):
        check_overrides(words.split(), multirun=True)
        assert f"+experiment={name}" in words


def test_paper_experiments_have_the_settings_of_the_paper():
    galaxies, photographs = (compose(f"+experiment={name}") for name in ("galaxymnist_paper", "miniimagenet_1pct"))
    for config in (galaxies, photographs):
        assert config.algorithm.name == "fixmatch_reference"
        assert config.oracle.name == "paper_oracle"
        assert (config.al.cycles, config.model.image_size, config.trainer.iterations) == (3, 224, 100)
    assert tuple(galaxies.al.initial.values()) == (10, 30)
    assert tuple(photographs.al.initial.values()) == (5, 495)


@pytest.mark.slow
def test_demo_quick_runs(command, tiny_job, tmp_path):
    outcome = command(*tiny_job, "+experiment=demo_quick", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    config = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert (config.oracle.name, config.algorithm.name, config.trainer.iterations) == ("top_k", "fixmatch", 2)
    assert (tmp_path / "out" / "report.html").is_file()


@real_data
@pytest.mark.parametrize("dataset", ["galaxyzoo1", "miniimagenet"])
def test_real_images_run(command, dataset, tiny_model, tmp_path):
    root = Path(os.environ["ANOMALYMATCH_DATA"]) / dataset
    words = [f"dataset={dataset}", f"data.root={root}", "algorithm=probe", "al.cycles=1", "hydra.run.dir=out"]
    outcome = command(*tiny_model, *words)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


def test_makefile_names_existing_experiments():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"\+experiment=(\w+)", text)) <= set(NAMES)
    assert {(ROOT / script).is_file() for script in re.findall(r"python (experiments/\w+\.py)", text)} == {True}


@pytest.fixture
def experiment(call_main, monkeypatch, tmp_path):
    """Function that runs an experiment in this process and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        outcome = call_main(importlib.import_module(name).main, *words)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same_process(target, args):
    """Make a process that runs its target in this process, which saves the import of the library."""
    return SimpleNamespace(start=partial(target, *args), join=lambda: None, exitcode=0)


@pytest.mark.slow
def test_benchmark_fills_its_tables_and_resumes(experiment, tmp_path, monkeypatch):
    words = ["--quick", "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    assert "| probe | 1 | 1 | +0.000" in experiment("benchmark", *words, "--algorithms", "probe")
    (draw,) = (tmp_path / "runs" / "quick" / "benchmark").glob("*.csv")
    before = draw.read_bytes()
    context = SimpleNamespace(Process=same_process)
    monkeypatch.setattr("benchmark.multiprocessing", SimpleNamespace(get_context=lambda kind: context))
    several = ["probe", "nearest labelled", "knn", "fixmatch"]
    everything = experiment("benchmark", *words, "--algorithms", *several)
    assert draw.read_bytes() == before
    rows = read(tmp_path / "results" / "benchmark.csv")
    assert {row["algorithm"] for row in rows} == set(several)
    assert [row["spent"] for row in rows if row["algorithm"] == "knn"] == ["0", "20", "40"]
    assert all(0 <= float(row["ap"]) <= 1 and int(row["peak_mb"]) > 100 for row in rows)
    first = next(row for row in rows if row["algorithm"] == "knn")
    line = next(line for line in everything.splitlines() if line.startswith("| all | "))
    assert f"{float(first['ap']):.3f}" in line
    assert (tmp_path / "results" / "benchmark_found.png").stat().st_size > 10_000
    words[2] = tmp_path / "elsewhere"
    assert experiment("benchmark", *words, "--algorithms", *several) == everything  # restored from the table
    assert len(list((tmp_path / "elsewhere" / "quick" / "benchmark").glob("*.csv"))) == len(several)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_gpu_measures_its_parts_once(experiment, tmp_path):
    """All parts but the compiler, which takes minutes without saying more than PyTorch's own tests."""
    words = ["--quick", "--runs", tmp_path / "runs", "--results", tmp_path]
    quick = ("forward", "decoding", "end_to_end", "reranking")
    experiment("gpu", *words, "--parts", *quick)
    experiment("gpu", *words, "--parts", *quick, "msc", "protocol")
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["part"] for line in lines)) == [*quick, "msc", "protocol"]
    assert len({json.dumps(line) for line in lines}) == len(lines) == 4 + 1 + 2 + 1 + 1 + 2
    assert all(line["per_second"] > 0 for line in lines if "per_second" in line)
    assert [line["what"] for line in lines if line["part"] == "protocol"] == ["fixmatch_reference", "fixmatch"]
    assert all(0 <= line["ap"] <= 1 for line in lines if line["part"] == "protocol")


def test_augmentations_draws_a_row_for_each_image(experiment, tmp_path):
    words = ["dataset=demo", "dataset.source.count=20", "dataset.source.size=32", "model.image_size=32"]
    for name in ("galaxies", "texture"):
        experiment(
            "augmentations",
            *words,
            f"augment={name}",
            "--images",
            3,
            "--tile",
            32,
            "--output",
            tmp_path / f"{name}.png",
        )
    sheets = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("galaxies", "texture")]
    (height, width), (columns, rows) = sheets[0].shape[:2], (11, 3)
    assert 0 < width - 32 * columns < 20 * columns
    assert 0 < height - 32 * rows < 50 * rows
    original = np.s_[:, :50]  # the first column
    assert np.array_equal(sheets[0][original], sheets[1][original])
    assert not np.array_equal(*sheets)


@pytest.mark.slow
def test_adaptation_compares_both_features_and_adapts_once(experiment, tmp_path):
    words = ["dataset.source.count=400", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"]
    words += ["dataset.start.normals=20", "model.name=test_efficientnet", "model.weights=none", "model.image_size=32"]
    words += ["adapt.batch_size=64", "adapt.held_out=32", "adapt.collapse=0.0"]
    options = ["--quick", "--runs", tmp_path / "runs", "--results", tmp_path]
    printed = experiment("adaptation", *words, *options)
    rows = read(tmp_path / "adaptation.csv")
    assert [(row["method"], row["epochs"], row["draw"]) for row in rows] == [
        ("pretrained", "0", "0"),
        ("simclr", "1", "0"),
    ]
    assert rows[0]["ap"] != rows[1]["ap"]
    assert all(0 < float(row["ap"]) <= 1 and 0 < int(row["found"]) <= 35 for row in rows)
    (weights,) = (tmp_path / "runs").rglob("weights.safetensors")
    before = weights.stat().st_mtime_ns
    assert experiment("adaptation", *words, *options) == printed
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_final_head_trains_once(experiment, tmp_path):
    words = ["--quick", "--tasks", "demo lenses", "--results", tmp_path]
    printed = experiment("final_head", *words)
    before = (tmp_path / "final_head.csv").read_bytes()
    (row,) = read(tmp_path / "final_head.csv")
    assert (row["task"], row["size"], row["draw"]) == ("demo lenses", "32", "0")
    aps = [float(row[name]) for name in ("probe", "trained", "refitted", "mean")]
    assert len({ap for ap in aps if 0 < ap <= 1}) == 4
    assert f"| demo lenses | 32 | 1 | {' | '.join(f'{ap:.3f}' for ap in aps)} |" in printed
    assert experiment("final_head", *words) == printed
    assert (tmp_path / "final_head.csv").read_bytes() == before


@pytest.mark.slow
def test_configured_sizes_makes_one_training_at_a_time(experiment, tmp_path):
    words = ["--quick", "--results", tmp_path]
    assert len(experiment("configured_sizes", *words, "--trainings", 0).splitlines()) == 4  # empty tables
    printed = experiment("configured_sizes", *words)
    (row,) = read(tmp_path / "configured_sizes.csv")
    aps = [f"{float(row[name]):.3f}" for name in ("probe", "fixmatch", "mean")]
    assert len(set(aps)) == 3
    assert f"| demo lenses | 32 | 2 | {' | '.join(aps)} |" in printed
    assert experiment("configured_sizes", *words) == printed


@needs_openvino
def test_mean_scoring_compares_one_network_with_two(experiment, tmp_path):
    printed = experiment("mean_scoring", "--quick", "--results", tmp_path)
    rows = read(tmp_path / "mean_scoring.csv")
    assert [row["backend"] for row in rows] == ["torch"] * 3 + ["openvino"] * 3
    for row in rows:
        one = next(each for each in rows if each["backend"] == row["backend"] and each["networks"] == "one")
        assert float(row["times_alone"]) == pytest.approx(float(one["per_second"]) / float(row["per_second"]))
        assert f"| 32 | {row['backend']} | {row['networks']} | 1 | {float(row['per_second']):.3f} |" in printed


def test_two_networks_of_mean_scoring_share_the_stages_that_it_names():
    paired = importlib.import_module("mean_scoring").paired
    network = network_of("tf_efficientnet_lite0").eval()
    for equal, shared in ((3, 3), (None, 0)):
        pair = paired(network, equal)
        assert count_equal_stages(network.backbone.body, pair.second.backbone.body) == shared
        assert pair.backbone is network.backbone


def test_whitened_probe_is_the_probe_on_whitened_features():
    """Whiten rows by the definition, a power of the covariance, and choose the power fold by fold."""
    whitening = importlib.import_module("whitening")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(700, 10)) * np.geomspace(1.0, 0.05, 10)
    rows[:25] += np.eye(10)[5] * 0.5 + np.eye(10)[8] * 0.2
    rows = (rows @ np.linalg.qr(rng.normal(size=(10, 10)))[0]).astype(np.float32)
    scaling = Scaling((slice(0, 6), slice(6, 10)), np.linspace(0.5, 2.0, 10).astype(np.float32))
    labelled, pool, targets = rows[:100], rows[100:], np.repeat([1, 0], [25, 75])
    axes, powers, seen, expected = whitening.Axes.measure(pool, scaling), (0.0, 0.3, 1.0), [], []
    for number, block in enumerate(scaling.blocks):
        scaled = rows[:, block].astype(np.float64) * scaling.scale[block]
        covariance = np.cov(scaled[100:].T, bias=True)
        floor = whitening.FLOOR * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        scores, whitened = [], []
        for power in powers:
            matrix = fractional_matrix_power(covariance + floor, -power / 2)
            length = np.trace(covariance) / np.trace(matrix @ covariance @ matrix)
            whitened.append((scaled @ matrix * length**0.5).astype(np.float32))
            folds = []
            for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(labelled, targets):
                some = [whitened[-1][train[targets[train] == kind]] for kind in (1, 0)]
                logits = fit_logistic(*some, inverse_regularisation=10.0).logits(whitened[-1])
                known = np.append(targets[test], np.zeros(600))
                folds.append(average_precision_score(known, np.append(logits[test], logits[100:])))
            scores.append(np.mean(folds))
        best = int(np.argmax(scores))
        seen.append(whitened[best])
        expected.append(axes.factors(number, powers[best]))
    coordinates = axes.rotate(rows)
    parts = coordinates[:25], coordinates[25:100], coordinates[100:]
    found = whitening.choose_whitening(*parts, axes, powers, SELF_TRAINING)
    np.testing.assert_allclose(found.scale, np.concatenate(expected), rtol=1e-6)
    assert len({tuple(np.round(each, 3)) for each in expected} | {(1.0,) * 6, (1.0,) * 4}) > 2  # one is whitened
    seen = np.concatenate(seen, axis=1)
    twin = self_train(seen[:25], seen[25:100], seen[100:], SELF_TRAINING, Scaling(scaling.blocks, np.ones(10, "f4")))
    probe = self_train(*parts, SELF_TRAINING, found)
    np.testing.assert_allclose(probe.last.logits(coordinates), twin.last.logits(seen), atol=5e-3)


@pytest.mark.slow
def test_probe_variants_resume(experiment, tmp_path):
    words = ["--quick", "--results", tmp_path]
    printed = experiment("probe_variants", *words)
    rows = read(tmp_path / "probe_variants.csv")
    assert {row["part"] for row in rows} == {"start", "search"}
    assert len({row["ap"] for row in rows if row["ap"]}) > 3
    assert all(float(row["found"]) > 10 for row in rows if row["found"])
    assert experiment("probe_variants", *words) == printed


@pytest.mark.slow
@real_data
def test_clustering_writes_a_row_for_every_method(experiment, tmp_path):
    printed = experiment("clustering", "--quick", "--runs", tmp_path / "runs", "--results", tmp_path)
    rows = read(tmp_path / "clustering.csv")
    assert {row["method"] for row in rows} == {"pooled", "average", "hausdorff", "unsupervised"}
    assert all(0 <= float(row["nmi"]) <= 1 and row["images"] == "48" for row in rows)
    assert "| neu_steel | 3+4 | 64 | pooled |" in printed


@pytest.mark.slow
@real_data
def test_clustering_is_compared_with_a_classifier(experiment, tmp_path):
    experiment("clustering", "--classifier", "--quick", "--runs", tmp_path / "runs", "--results", tmp_path)
    (row,) = read(tmp_path / "clustering_classifier.csv")
    assert row["method"] == "unsupervised"
    assert 0 < float(row["groups"]) <= 1
    assert 0.5 < float(row["classifier"]) <= 1


def test_cost_of_clustering_has_the_parts_that_are_asked_for(experiment, tmp_path):
    experiment("clustering", "--cost", "--sizes", 12, "--parts", "all", "ward_groups", "--results", tmp_path)
    (row,) = read(tmp_path / "clustering_cost.csv")
    assert list(row) == ["images", "threads", "all_s", "all_cpu", "ward_groups_s", "ward_groups_cpu"]
    assert float(row["all_cpu"]) > 0


def test_startup_takes_the_time_of_a_process_and_sees_whether_it_failed(tmp_path):
    startup = importlib.import_module("startup")
    busy = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    row = startup.measure(startup.Command(("-c", busy)), tmp_path)
    assert 0.3 <= row["processor"] <= row["seconds"] + 0.1
    fails = ("-c", "raise SystemExit('no such file')")
    assert startup.measure(startup.Command(fails, fails=True), tmp_path)["seconds"] > 0
    for command in (startup.Command(fails), startup.Command(("-c", ""), fails=True)):
        with pytest.raises(RuntimeError, match="ended with"):
            startup.measure(command, tmp_path)
    talks = "import time; print(); print('first', flush=True); time.sleep(60)"
    assert startup.measure(startup.Command(("-c", talks), until=startup.first_line), tmp_path)["seconds"] < 30
    with pytest.raises(RuntimeError, match="no such file"):
        startup.measure(startup.Command(fails, until=partial(startup.first_line, holding="http")), tmp_path)
    rows = [
        {"what": what, "seconds": s, "processor": 1.0} for what, s in (("import torch", 2.0), ("x", 3.0), ("x", 5.0))
    ]
    assert startup.summary(rows, {"import torch": None, "x": 9.0}).endswith("| x | 4.00 | 1.00 | 2.00 | 1.00 | 9 |")


@pytest.mark.slow
def test_startup_measures_every_command(experiment, tmp_path):
    printed = experiment("startup", "--quick", "--results", tmp_path)
    seconds = {row["what"]: float(row["seconds"]) for row in read(tmp_path / "startup.csv")}
    assert seconds["import anomalymatch"] < seconds["import torch"] < seconds["score"]
    assert len(seconds) == 7
    assert "| page, first picture |" in printed


@pytest.mark.slow
def test_all_labels_finds_more_than_random_and_no_more_than_exists(experiment, tmp_path):
    words = ["dataset.source.count=400", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"]
    words += ["dataset.start.normals=20", "model.name=test_efficientnet", "model.weights=none", "model.image_size=32"]
    words += ["model.stages=false", "probe.rounds=0"]
    experiment("all_labels", *words, "--tasks", "demo lenses", "--draws", 2, "--results", tmp_path)
    rows = read(tmp_path / "all_labels.csv")
    assert [(row["draw"], row["there"]) for row in rows] == [("0", "35"), ("1", "35")]
    assert all(20 <= int(row["found"]) <= 35 for row in rows)  # a random 200 of 375 contain 19
    assert rows[0]["ap"] != rows[1]["ap"]


@pytest.mark.slow
def test_text_ranks_by_a_description(experiment, tmp_path):
    pytest.importorskip("open_clip", reason='pip install "anomalymatch[text]"')
    words = ["dataset.source.count=400", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"]
    model = write_tiny_clip(tmp_path / "clip")
    printed = experiment("text", "--quick", *words, f"text.model={model}", "--results", tmp_path)
    (row,) = read(tmp_path / "text.csv")
    assert row["task"] == "demo lenses"
    assert 0 <= int(row["found_100"]) <= int(row["found_200"]) <= int(row["there"]) == 40
    assert f"| {float(row['ap']):.3f} |" in printed


def test_patch_heads_find_planted_patches_and_choose_their_weight_on_other_draws():
    module = importlib.import_module("patch_head")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 9, 24)).astype(np.float32)
    rows[..., 10] += 10  # ordinary patches are alike
    rows[:10, 4, :3] += 6  # one patch of each anomaly
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    rare, common = np.arange(5), np.arange(20, 60)
    scores = {
        "instances": module.best(module.project(rows, module.multiple_instances(rows, rare, common, rng)), 1),
        "distance": module.distances(rows, common, rng),
    }
    for values in scores.values():
        assert values[5:10].mean() > values[10:20].mean()
    assert np.argmax(module.project(rows[5:6], module.multiple_instances(rows, rare, common, rng))) == 4
    gained = {(0, 1.0): 0.2, (1, 1.0): 0.1, (0, 0.25): 0.1, (1, 0.25): 0.3}
    measured = [{"class": "crack", "draw": k, "head": "x", "weight": w, "ap": 0.5 + g} for (k, w), g in gained.items()]
    plain = [{"class": "crack", "draw": k, "head": "none", "weight": 0.0, "ap": 0.5} for k in (0, 1)]
    table = module.gains([*plain, *measured], draws=2).splitlines()
    assert table[-1] == "| crack | x | 1.0 |  | +0.100 |"  # better on draw 0, so it counts on draw 1


def test_sufficient_share_of_a_first_look_by_hand():
    sufficient_share = importlib.import_module("cascade").sufficient_share
    full = np.arange(200.0)  # the top two are 199 and 198
    assert sufficient_share(full, full, 2) == 0.01
    first = full.copy()
    first[198] = 99.5  # 99 images are higher
    assert sufficient_share(first, full, 2) == 0.5
    assert sufficient_share(first, full, 100) == 0.495  # one of a hundred may be missed


@pytest.mark.slow
def test_cascade_measures_its_parts_once(experiment, tmp_path):
    words = ["--quick", "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    experiment("cascade", *words)
    (row,) = read(tmp_path / "results" / "cascade_jobs.csv")
    assert row["used"] in ("True", "False")
    assert 0.9 <= float(row["recall of the top 1 %"]) <= 1
    rows = read(tmp_path / "results" / "cascade_shares.csv")
    assert [(row["first look"], row["top"]) for row in rows] == [
        ("28", "12"),
        ("28", "1000"),
        ("36", "12"),
        ("36", "1000"),
    ]
    assert all(float(row["share that suffices"]) <= float(row["share"]) <= 1 for row in rows)
    assert [row["student"] for row in read(tmp_path / "results" / "cascade_student.csv")] == [
        "32 px, regression",
        "32 px, fine-tuned",
    ]
    experiment("cascade", *words, "--parts", "jobs")
    assert read(tmp_path / "results" / "cascade_jobs.csv") == [row]


def test_scratches_are_all_that_distinguishes_surfaces_with_them():
    module = importlib.import_module("large_images")
    with_one, without = (module.surface(400, has, np.random.default_rng(3)).astype(int) for has in (True, False))
    rows, columns = np.nonzero(np.abs(with_one - without) > 20)
    assert 20 <= np.hypot(np.ptp(rows), np.ptp(columns)) <= 34  # 30 px, without the faint ends
    assert (with_one <= without).all()


def test_mosaics_show_the_pasted_tile_as_it_is_on_tiles_without_a_defect():
    module = importlib.import_module("large_images")
    free = [np.full((300, 200), 10 * k, np.uint8) for k in range(1, 4)]
    pasted = np.full((120, 285), 255, np.uint8)
    image = module.mosaic(free, pasted, 768, np.random.default_rng(0))
    assert image.shape == (768, 768)
    assert set(np.unique(image)) <= {10, 20, 30, 255}
    rows, columns = np.nonzero(image == 255)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (120, 285, 120 * 285)


def test_parts_of_features_with_tiles_are_chosen_from_both_layers():
    module = importlib.import_module("large_images")
    rows = np.arange(15, dtype=np.float16)[None]
    features = Features([Shard(["a"], rows, [])], stage_width=9)
    assert module.columns_of(features, (1,)).tolist() == [2, 3, 9, 10, 11]
    assert module.columns_of(features, (0, 2)).tolist() == [0, 1, 4, 5, 6, 7, 8, 12, 13, 14]


def test_plots_of_the_results_show_the_intervals_of_the_page_and_cut_nothing():
    page = (ROOT / "docs" / "explanation" / "results.md").read_text(encoding="utf-8")
    assert re.findall(r"results/result_(\w+)\.png\)", page) == list(result_plots.PLOTS)
    assert re.findall(r"^## (\d+)\. ", page, flags=re.MULTILINE) == [str(place) for place in range(1, 11)]
    for name, panels in result_plots.PLOTS.items():
        figure = result_plots.draw(panels())
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert box.min.min() >= 0, name
        assert (box.max <= figure.get_size_inches()).all(), name
    (found,), (gain,) = result_plots.found(), result_plots.fixmatch()
    hourglass = found.series["probe, as configured"][0]
    assert [round(1.95 * end, 1) for end in hourglass] == [170.3, 169.8, 170.8]  # of 195, and 170.3 ± 0.5 on the page
    over_draws, over_tasks = gain.series["fixmatch"][-2:]
    assert [round(i.high - i.mean, 3) for i in (over_draws, over_tasks)] == [0.028, 0.053]
    assert round(over_draws.mean, 3) == 0.06


def test_points_of_a_plot_are_means_with_their_intervals_from_the_top():
    first, second = Interval(2.0, 1.0, 4.0), Interval(5.0, 5.0, 5.0)
    panel = result_plots.Panel("found", ["top", "bottom"], {"a": [first, second], "b": [None, second]}, start=0)
    (axes,) = result_plots.draw([panel]).axes
    (a, _, (bars,)), (b, _, _) = axes.containers
    assert [line.get_xdata().tolist() for line in (a, b)] == [[2, 5], [5]]
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[1, 4], [5, 5]]
    heights = axes.transData.transform([(0, y) for y in (*a.get_ydata(), *b.get_ydata())])[:, 1]
    assert heights[0] > heights[1] > heights[2]  # the series of a row have places of their own
