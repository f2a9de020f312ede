import re
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from anomalymatch.active import report as module
from anomalymatch.active.report import RunReport, unlabelled_rest, write_sheets
from anomalymatch.active.run_folder import CONFIG, METRICS, SCORES, STEPS, RunFolder, to_csv, to_json
from anomalymatch.backbones.checkpoint import save_network
from anomalymatch.data.task import make_task
from anomalymatch.evaluation.advice import StoppingRule
from anomalymatch.evaluation.confidence import proportion_interval
from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / CONFIG).write_text(
        "algorithm: {name: fixmatch}\nmodel: {name: tiny, image_size: '${dataset.image_size}', crops: 5, tiles: auto}\n"
        "seed: 7\n"
        "dataset: {anomaly: rare, image_size: 32}\nal: {cycles: 3}\noracle: {name: top_k}\n"
    )
    yield folder
    folder.close()


def finish(folder, task, cycle, *, steps=(), **row):
    ranking = Ranking([*task.pool, *task.holdout], np.random.default_rng(cycle).normal(size=len(task.source.ids)))
    with folder.write_cycle(cycle) as path:
        ranking.write(path / SCORES)
        (path / STEPS).write_text(to_csv(list(steps)))
        write_sheets(path, task, folder.labels.current(until_cycle=cycle - 1), ranking)
        values = {"cycle": cycle, "labels": 8 + 4 * cycle, "found": 2 * cycle, "rejects": 0}
        (path / METRICS).write_text(to_json(values | row))


@pytest.fixture
def quick(monkeypatch):
    """Tiny pictures, where only the words matter."""
    monkeypatch.setattr(module.plots, "save", lambda figure, path: Image.new("RGB", (4, 4)).save(path))
    monkeypatch.setattr(module, "contact_sheet", lambda images, captions, *, frames: Image.new("RGB", (4, 4)))


STOPPING = StoppingRule(40, 20, 3, 0.1, 0.1)


def html_of(folder, task):
    return RunReport(folder, task, STOPPING).write().read_text(encoding="utf-8")


MEASURED = {"auroc": 0.9, "ap": 0.5, "precision_at_1pct": 1.0, "heldout_ap": 0.4, "seconds": 1.0}


def test_the_report_shows_every_figure_of_a_benchmark(folder, task):
    folder.labels.append({task.pool[0]: Label.ANOMALY, task.pool[1]: Label.NORMAL}, annotator="start", cycle=0)
    steps = [{"step": 0.0, "loss_lb": 0.5, "loss_ulb": 0.1, "pass_rate": 0.2, "pass_rate_anomaly": 0.0}]
    for cycle in (1, 2):
        finish(folder, task, cycle, steps=steps, **MEASURED)
    html = html_of(folder, task)
    names = {path.stem for path in folder.plots.glob("*.png")}
    assert names == {"pr", "roc", "metrics", "discovery", "scores", "training"}
    assert html.count("data:image/png;base64,") == len(names) + 2
    expected = ("The top 64", "Worst false positives", "fixmatch", "5 crops, model.tiles=auto", "2 of 3 cycles, top_k")
    assert [text for text in (*expected, "rare: 8 of", f"resume={folder.path}") if text not in html] == []
    assert "al.cycles=" not in html  # of three cycles one is left
    assert "orange frames are true anomalies" in html
    assert "image_size: 32" in html  # the configuration, resolved
    assert not re.search(r'(src|href)="(https?:)?//', html)


def test_the_report_of_an_archive_mentions_missing_metrics(folder, make_source):
    task = make_task(make_source(30, truth=None))
    folder.labels.append({task.pool[0]: Label.ANOMALY, task.pool[1]: Label.NORMAL}, annotator="start", cycle=0)
    finish(folder, task, 1)
    html = html_of(folder, task)
    assert {path.stem for path in folder.plots.glob("*.png")} == {"scores"}
    assert "there are no metrics" in html
    assert "own labels" in html
    assert "Worst false positives" not in html
    assert "orange frames" not in html


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"probe_ap": 0.51}, "al.cycles=4"),
        ({"rejects": 3}, "rejects.parquet"),
        ({"probe_ap": 0.53}, "worse than the probe"),
    ],
)
def test_the_report_suggests_more_cycles_and_warns_of_rejects_and_a_better_probe(folder, task, quick, row, said):
    for cycle in (1, 2, 3):
        finish(folder, task, cycle, **MEASURED | row)
    html = html_of(folder, task)
    assert said in html
    assert ("rejects.parquet" in html) == ("rejects" in row)
    assert ("worse than the probe" in html) == (row.get("probe_ap") == 0.53)


@pytest.mark.parametrize(
    ("cycles", "worse"),
    [
        ([(0.5, 0.5, 0.3, 0.3), (0.1, 0.4, 0.5, 0.4)], False),  # later pools have lost what the ranking found
        ([(0.5, 0.4, 0.3, 0.3), (0.5, 0.4, 0.4, 0.5)], True),
        ([(0.5, 0.4, 0.3, 0.5), (0.5, 0.4, 0.6, 0.4)], False),  # the mean of the cycles
        ([(0.4, 0.5, np.nan, np.nan), (0.5, 0.1, np.nan, np.nan)], True),
        ([(0.5, 0.5, np.nan, np.nan), (0.1, 0.5, np.nan, np.nan)], False),
    ],
)
def test_the_probe_is_compared_on_images_that_no_ranking_has_chosen(folder, task, cycles, worse):
    names = ("ap", "probe_ap", "heldout_ap", "probe_heldout_ap")
    for cycle, values in enumerate(cycles, 1):
        finish(folder, task, cycle, **MEASURED | dict(zip(names, values, strict=True)))
    assert ("worse than the probe" in html_of(folder, task)) == worse


def test_the_report_shows_estimates_of_an_audit(folder, task):
    left = {"left": 6.0, "left_low": 2.0, "left_high": 31.0, "audited": 40}
    finish(folder, task, 1, **MEASURED | {"left": float("nan"), "left_low": float("nan"), "left_high": float("nan")})
    html = html_of(folder, task)
    assert "Left" not in html
    assert "random audit" not in html
    assert not (folder.plots / "left.png").exists()
    finish(folder, task, 1, **MEASURED | left)
    html = html_of(folder, task)
    assert "(40 images that are still unlabelled): about 6 " in html
    assert "<th" in html
    assert "Left high" in html
    assert (folder.plots / "left.png").exists()


def test_undefined_metrics_do_not_stop_the_report(folder, task):
    rare = [id_ for id_ in task.pool if id_ in task.anomalies]
    folder.labels.append(dict.fromkeys(rare, Label.ANOMALY), annotator="start", cycle=0)
    finish(folder, task, 1, **MEASURED | {"auroc": float("nan"), "ap": float("nan")})
    assert "\N{EN DASH}" in html_of(folder, task)


def test_the_scores_of_a_cycle_are_read_once(folder, task, quick, monkeypatch):
    read = []
    ranking = RunFolder.ranking
    monkeypatch.setattr(RunFolder, "ranking", lambda self, cycle: read.append(cycle) or ranking(self, cycle))
    report = RunReport(folder, task, STOPPING)
    for cycle in range(1, 6):
        finish(folder, task, cycle, **MEASURED)
        report.write()
    assert len(read) == 2 * 5  # once for the curves, once for the histogram
    assert [read.count(cycle) for cycle in range(1, 6)] == [2] * 5


def test_unlabelled_rest_excludes_labelled_and_held_out_images(folder, task, quick):
    folder.labels.append({task.pool[0]: Label.ANOMALY}, annotator="start", cycle=0)
    folder.labels.append({task.pool[1]: Label.NORMAL}, annotator="oracle", cycle=1)
    for cycle in (1, 2):
        finish(folder, task, cycle, **MEASURED)
    assert set(unlabelled_rest(folder, task, 1).ids) == set(task.pool) - {task.pool[0]}
    assert set(unlabelled_rest(folder, task, 2).ids) == set(task.pool) - set(task.pool[:2])


def test_sheets_show_the_unlabelled_top_and_the_worst_normals(task, tmp_path, monkeypatch):
    sheets = []

    def remember(images, captions, *, frames):
        sheets.append((list(captions), list(frames)))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(module, "contact_sheet", remember)
    ids = [*task.pool, *task.holdout]
    ranking = Ranking(ids, np.linspace(4, -4, len(ids)))
    write_sheets(tmp_path, task, {task.pool[0]: Label.ANOMALY}, ranking)
    (top, frames), (worst, blue) = sheets
    assert [caption.split("\n")[0] for caption in top] == task.pool[1:65]
    score = ranking.score_of([task.pool[1]])[task.pool[1]]
    assert top[0] == f"{task.pool[1]}\n{score:.3f} {task.source.truth[task.pool[1]]}"
    colour = {True: FRAME_COLOURS[Label.ANOMALY], False: FRAME_COLOURS[Label.NORMAL]}
    assert frames == [colour[id_ in task.anomalies] for id_ in task.pool[1:65]]
    assert [caption.split("\n")[0] for caption in worst] == [i for i in task.pool[1:] if i not in task.anomalies][:64]
    assert set(blue) == {FRAME_COLOURS[Label.NORMAL]}
    assert {path.name for path in tmp_path.iterdir()} == {"top64.png", "false_positives.png"}


def test_evidence_of_the_network_that_ranked(folder, task, tiny_network, monkeypatch):
    save = folder.write_cycle

    @contextmanager
    def with_network(number):
        with save(number) as path:
            save_network(tiny_network, path / "weights.safetensors")
            yield path

    finish(folder, task, 1)
    assert "Evidence in" not in html_of(folder, task)
    monkeypatch.setattr(folder, "write_cycle", with_network)
    finish(folder, task, 2)
    with Image.open(folder.cycle(2) / "top_evidence.png") as sheet:
        assert np.asarray(sheet).std() > 10
    html = html_of(folder, task)
    assert "Evidence in the top 24" in html
    assert "add up to the log-odds" in html


def test_line_breaks_in_ids_and_classes_add_no_lines_to_sheets(make_source, tmp_path):
    sizes = set()
    for end in ("", "\n[/bold]\x1b[2J"):
        ids = [f"im{number}{end}" for number in range(12)]
        truth = {id_: f"{'rare' if id_ in ids[:2] else 'common'}{end}" for id_ in ids}
        task = make_task(make_source(12, ids=ids, truth=truth, size=8), anomaly=f"rare{end}")
        write_sheets(tmp_path, task, {}, Ranking(ids, np.arange(12.0)))
        with Image.open(tmp_path / "top64.png") as sheet:
            sizes.add(sheet.size)
    assert len(sizes) == 1


def test_panels_show_the_logged_values_of_all_cycles(folder, task, quick):
    nothing = float("nan")
    steps = [
        {"step": 0.0, "loss_lb": 0.5, "pass_rate": 0.2, "pass_rate_anomaly": 0.1, "pseudo_precision_anomaly": nothing}
    ]
    finish(folder, task, 1, steps=steps, **MEASURED)
    finish(folder, task, 2, steps=[{**steps[0], "pseudo_precision_normal": 1.0}], **MEASURED)
    panels = RunReport(folder, task, STOPPING).panels(2)
    assert panels["labelled\nloss"] == {"": [0.5, 0.5]}
    assert panels["pass rate,\nanomaly"] == {"anomaly": [0.1, 0.1]}
    assert panels["precision of\npseudo-labels"] == {"normal": [pytest.approx(nothing, nan_ok=True), 1.0]}
    assert "threshold" not in panels


def test_held_out_metrics_have_an_interval_and_classes_no_brackets(folder, task, quick):
    config = folder.path / CONFIG
    config.write_text(config.read_text().replace("anomaly: rare", "anomaly: [rare, odd]"))
    finish(
        folder,
        task,
        1,
        **MEASURED | {"heldout_auroc": 1.0, "heldout_recall_at_1pct": float("nan")},
        heldout_anomalies=8,
    )
    html = html_of(folder, task)
    low, high = proportion_interval(0.4, 8)
    assert f"{low:.2f} to {high:.2f}, by 8 anomalies" in html
    assert "to 1.00, by 8 anomalies" in html
    assert "rare, odd: 8 of" in html
    assert "[&#39;" not in html
