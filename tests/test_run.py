"""The command, as a newcomer meets it: most of it in this process, because a new one takes ten seconds to import."""

import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from pictures import write_photos
from PIL import Image

import anomalymatch as am
from anomalymatch import score
from anomalymatch.errors import ConfigError
from anomalymatch.ranking import Ranking
from anomalymatch.run import show

ONE_LINE = [
    (["al.cylces=3"], "did you mean al.cycles?"),
    (["-m", "seed=0,x"], "seed=x"),
    (["resume=nowhere"], "nowhere"),
    (["dataset=folder"], "data.root=PATH"),
    (["log_level=loud"], "log_level is 'loud'"),
    (["al.cycles=${nowhere}"], "nowhere"),
    (["al.initial.anomalies=500"], "500 images"),
    (["algorithm.learner.optimizer.lr=-1.0"], "algorithm.learner.optimizer: Invalid learning rate: -1.0"),
    (["hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
    (["hydra/launcher=nope"], "hydra/launcher/nope"),
    (["inference.device=cuda:99"], "inference.device is 'cuda:99'"),
    (["inference.device=warp"], "inference.device is 'warp'"),
]
"""One example for each place that checks; `test_config.py` and `test_build.py` have the other wrong values."""


@pytest.mark.parametrize(("words", "message"), ONE_LINE, ids=[" ".join(words) for words, _ in ONE_LINE])
def test_errors_are_one_line_and_leave_no_files(command, tiny_job, tmp_path, words, message):
    keys = {word.partition("=")[0] for word in words}
    job = [w for w in tiny_job if w.partition("=")[0] not in keys and not keys & {"dataset", "resume"}]
    outcome = command(*sorted([*job, *words], key=lambda word: word != "-m"))
    assert message in outcome.error_line
    assert len(outcome.err.splitlines()) <= 2  # the first says that the command has started
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any((tmp_path / "runs").glob("*"))


def test_cfg_shows_the_keys(command):
    outcome = command("--cfg", "job", "al.cycles=7")
    assert outcome.code == 0
    assert "cycles: 7" in outcome.out
    assert "hydra:" not in outcome.out
    assert "al.cycles" in command("--cfg", "job", "al.cylces=3").error_line


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_need_no_required_key(call_main, words):
    outcome = call_main(score.main, *words)
    assert outcome.code == 0, outcome.err
    assert "backend" in outcome.out


def test_a_run_prints_its_metrics_and_the_path_of_the_report(command, probe_job, tmp_path):
    outcome = command(*probe_job, "al.cycles=1")
    assert outcome.code == 0, outcome.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("demo-probe-")
    assert f"runs/{folder.name}/report.html" in outcome.err.splitlines()[-1]
    assert all(name in outcome.err for name in ("AUROC", "held-out AP", "P@1%"))
    assert max(map(len, outcome.err.splitlines()[:-1])) <= 80
    assert "…" not in outcome.err
    assert outcome.out == ""


def test_names_in_the_table_are_not_interpreted_as_markup(capsys, tmp_path):
    show([{"cycle": 1, "labels": 3, "found": 1, "ap": float("nan"), "seconds": 0.5}], tmp_path / "[red]a")
    said = capsys.readouterr().err
    assert "[red]a" in said
    assert "nan" not in said
    assert " - " in said


def test_ctrl_c_prints_one_line_and_exits_with_130(command, probe_job, monkeypatch, tmp_path, without_pictures):
    from anomalymatch.algorithms.probe.learner import ProbeLearner

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    real = ProbeLearner.fit
    monkeypatch.setattr(ProbeLearner, "fit", interrupt)
    outcome = command(*probe_job, "hydra.run.dir=out")
    assert outcome.code == 130
    assert f"python -m anomalymatch.run resume={tmp_path / 'out'}" in outcome.err.splitlines()[-1]
    monkeypatch.setattr(ProbeLearner, "fit", real)
    assert command("resume=out").code == 0


def test_a_run_with_other_settings_in_the_same_folder_is_refused(command, probe_job, without_pictures):
    assert command(*probe_job, "hydra.run.dir=out").code == 0
    assert "seed=0, not 1" in command(*probe_job, "seed=1", "hydra.run.dir=out").error_line


def test_module_and_function_of_the_same_name_can_be_called(probe_job, tmp_path, without_pictures):
    import anomalymatch.run

    rows = am.run(*probe_job, "al.cycles=1", folder=tmp_path / "run")
    assert am.run is anomalymatch.run is sys.modules["anomalymatch.run"]
    assert anomalymatch.run.run(*probe_job, "al.cycles=1", folder=str(tmp_path / "run")) == rows
    with pytest.raises(ConfigError, match=r"did you mean al\.budget"):
        am.run("al.budgets=3", folder=tmp_path / "other")


# --- a folder of one's own images -------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Dark images, every fifth with a bright square, and three files that are no images."""
    folder = tmp_path / "photos"
    (folder / "night").mkdir(parents=True)
    write_photos([folder / ("night" if i % 2 else ".") / f"{i:02d}.png" for i in range(30)])
    (folder / "empty.png").write_bytes(b"")
    (folder / "short.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("this is no image")
    return folder


def label(photos, **labels):
    lines = [f"{name.replace('_', '/')}.png,{said}" for name, said in labels.items()]
    (photos / "labels.csv").write_text("\n".join(["filename,label", *lines]) + "\n")


@pytest.mark.slow
def test_own_images_run_two_cycles_with_labels_from_a_file(command, photos, tiny_model, tmp_path):
    job = ["dataset=folder", f"data.root={photos}", "algorithm=probe", *tiny_model, "hydra.run.dir=out"]
    assert "labels.csv" in command(*job).error_line
    label(photos, **{"00": "anomaly", "night_01": "normal", "02": "normal", "night_03": "unsure"})
    outcome = command(*job)
    assert outcome.code == 0, outcome.err
    assert "No new labels since cycle 1" in " ".join(outcome.err.split())
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [reject["id"] for reject in rejects] == ["empty.png", "short.png", "text.jpg"]
    assert all(reject["reason"] for reject in rejects)
    ranking = Ranking.read(tmp_path / "out" / "cycles" / "01" / "scores.parquet")
    assert len(ranking) == 30
    assert not {"empty.png", "short.png", "text.jpg"} & set(ranking.ids)
    assert {"night/05.png", "10.png"} <= set(ranking.top(7))
    assert "Unreadable images" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    # More labels, one of them a correction: the counts say nothing of a yield then, and the report is still written.
    label(photos, **{"00": "anomaly", "night_01": "anomaly", "02": "normal", "night_03": "unsure", "04": "normal"})
    outcome = command("resume=out", "al.cycles=2")
    assert outcome.code == 0, outcome.err
    rows = [line.split(",")[:4] for line in (tmp_path / "out" / "metrics.csv").read_text().splitlines()]
    assert rows == [["cycle", "labels", "found", "rejects"], ["1", "4", "1", "3"], ["2", "5", "2", "3"]]


@pytest.mark.parametrize(
    "words",
    [["algorithm=probe"], ["algorithm=probe", "al.cold_start=mixed"], ["algorithm=knn"], ["algorithm=fixmatch"]],
    ids=" ".join,
)
def test_a_run_in_which_nothing_can_be_read_gives_the_commonest_reason(command, tiny_model, tmp_path, words):
    folder = tmp_path / "bands"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"text")
    for n in range(1, 8):
        pixels = np.zeros((8, 8, 12), np.uint16)
        tifffile.imwrite(folder / f"{n}.tif", pixels, photometric="minisblack", planarconfig="contig")
    if "al.cold_start=mixed" not in words:
        (folder / "labels.csv").write_text("filename,label\n0.png,anomaly\n1.tif,normal\n2.tif,normal\n")
    outcome = command("dataset=folder", f"data.root={folder}", *tiny_model, *words, "logger=none")
    assert outcome.code == 1
    pattern = r"bands: none of \d images can be read: \d of them because it has 12 bands.*\.tif\)"
    assert re.search(pattern, outcome.error_line)
    (found,) = tmp_path.rglob("rejects.parquet")
    assert pq.read_table(found).num_rows >= 3


@pytest.mark.parametrize("wrong", ["model.name=resnet_of_nobody", "al.strategy.name=expected al.strategy.prior=0.0"])
def test_a_refused_command_can_be_corrected_in_the_same_folder(command, probe_job, tmp_path, without_pictures, wrong):
    job = [*probe_job, "al.cycles=1", "oracle=top_k", "hydra.run.dir=out"]
    job = [word for word in job if not word.startswith("model.name")]
    assert command(*job, "model.name=test_efficientnet", *wrong.split()).code == 1
    assert not (tmp_path / "out" / "config.yaml").exists()
    assert command(*job, "model.name=test_efficientnet").code == 0


def test_a_run_that_is_refused_late_leaves_nothing_of_its_own(probe_job, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.png")
    words = [word for word in probe_job if word.startswith(("algorithm", "model", "inference", "logger", "data."))]
    words += ["dataset=folder", f"data.root={images}"]
    with pytest.raises(am.AnomalyMatchError):  # there is no label
        am.run(*words, folder=folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    am.run(*words, "al.cold_start=random", "al.cycles=1", folder=folder)
    assert (folder / "report.html").exists()
