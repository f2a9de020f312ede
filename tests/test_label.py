"""Tests of the labelling command without a page."""

import os
import shutil

import pytest
from omegaconf import OmegaConf

from anomalymatch import label as module
from anomalymatch.config import compose, resumed
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.label import open_service
from anomalymatch.types import Label
from anomalymatch.ui import ColumnOrder, FirstOrder, Query

A, N = Label.ANOMALY, Label.NORMAL


@pytest.fixture
def archive(image_folder):
    """Folder of forty images with two labels."""
    folder = image_folder(40)
    (folder / "labels.csv").write_text("filename,label\nim000000.png,anomaly\nim000001.png,normal\n")
    return folder


@pytest.fixture
def words(archive, tiny_model):
    short = ["trainer.iterations=2", "algorithm.learner.batch.labelled=2"]
    return ["dataset=folder", f"data.root={archive}", *tiny_model, *short]


@pytest.fixture
def open_it(monkeypatch, tmp_path):
    """Open the service like the command, in an empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    opened = []

    def call(*words):
        opened.append(open_service(compose(*words, name="label"), list(words)))
        opened[-1].preparation.wait()
        return opened[-1]

    yield call
    for service in opened:
        service.close()


def test_the_same_command_continues_in_its_run_folder(open_it, words, tmp_path):
    service = open_it(*words)
    assert service.run.resolve() == tmp_path / "work" / "runs" / "label-archive"
    assert service.labels == {"im000000.png": A, "im000001.png": N}
    service.label(["im000010.png"], A, "ada")
    service.close()
    again = open_it(*words)
    assert again.labels == {"im000000.png": A, "im000001.png": N, "im000010.png": A}
    assert [event.annotator for event in again.events] == ["labels file", "labels file", "ada"]


@pytest.mark.parametrize(
    ("cold_start", "order"),
    [
        ("diverse", FirstOrder.DIVERSE),
        ("mixed", FirstOrder.MIXED),
        ("knn", FirstOrder.NOVEL),
        ("random", FirstOrder.RANDOM),
    ],
)
def test_first_order_follows_the_cold_start(open_it, words, archive, cold_start, order):
    (archive / "labels.csv").unlink()
    assert f"shows {order}." in open_it(*words, f"al.cold_start={cold_start}").page(Query()).note


def test_a_run_folder_without_a_cold_start_shows_diverse_images_first(open_it, words, archive):
    (archive / "labels.csv").unlink()
    run = open_it(*words).run
    config = OmegaConf.load(run / "config.yaml")
    assert config.al.cold_start.name == "mixed"
    config.al.cold_start = {"name": "none", "learner": None}
    OmegaConf.save(config, run / "config.yaml")
    assert FirstOrder.DIVERSE in open_it(f"resume={run}").page(Query()).note


def test_other_settings_in_the_same_folder_are_refused(open_it, words):
    open_it(*words)
    with pytest.raises(ConfigError, match=r"dataset\.image_size=32, not 48"):
        open_it(*words, "dataset.image_size=48")


def test_labels_do_not_cross_archives(open_it, words, image_folder, archive, tmp_path):
    other = tmp_path / "elsewhere" / "archive"
    shutil.copytree(archive, other)
    first = open_it(*words)
    first.label(["im000010.png"], A, "ada")
    first.close()
    elsewhere = [*words, f"data.root={other}"]
    assert open_it(*elsewhere).labels["im000010.png"] is A  # the same images in another place
    open_it(*words)
    (other / "im000010.png").write_bytes((other / "im000011.png").read_bytes())
    with pytest.raises(ConfigError, match=r"ui\.run=FOLDER .*resume=runs/label-archive") as refused:
        open_it(*elsewhere)
    assert str(archive) in str(refused.value)
    assert "im000010.png" not in open_it(*elsewhere, f"ui.run={tmp_path / 'own'}").labels
    assert open_it(f"resume={first.run}", f"data.root={other}").labels["im000010.png"] is A  # on purpose
    (other / "im000012.png").unlink()
    assert len(open_it(*elsewhere).source) == 39  # an archive that changes in its place


def test_settings_of_the_page_may_change_and_do_not_hinder_the_main_job(open_it, words, tmp_path):
    service = open_it(*words)
    other = open_it(*words, "ui.port=0", "ui.compression=pca", "ui.dimensions=4")
    assert other._state.live.store.last_layer.dimensions == 4
    assert open_it(*words, f"ui.run={tmp_path / 'mine'}").run == tmp_path / "mine"
    config = resumed(service.run, compose("al.cycles=1"), ["al.cycles=1"])
    assert "ui" not in config
    assert config.data.root == str(tmp_path / "archive")


def test_kinds_of_a_team_have_groups_from_the_start(open_it, words):
    service = open_it(*words, "ui.kinds={lens: l, bright arc: e}")
    assert [group.name for group in service.groups.all()] == ["lens", "bright arc"]
    assert service.groups.keys == {"lens": "l", "bright arc": "e"}
    with pytest.raises(ConfigError, match=r"ui\.kinds: .*'a', which means 'anomaly' already"):
        open_it(*words, "ui.kinds={lens: a}")


def test_a_score_file_may_change_from_visit_to_visit(open_it, words, tmp_path):
    scores = tmp_path / "my scores.csv"
    scores.write_text("filename,value\nim000030.png,2\nim000020.png,3\n")
    order = Query(sort=ColumnOrder("value"), size=12)
    first = open_it(*words, f"ui.scores={scores}")
    assert [tile.id for tile in first.page(order).tiles[:3]] == ["im000030.png", "im000020.png", "im000002.png"]
    assert open_it(*words).columns.kinds == {}
    with pytest.raises(DataError, match="absent"):
        open_it(*words, f"ui.scores={tmp_path / 'absent.csv'}")


def test_resume_uses_the_images_of_the_run(open_it, words):
    first = open_it(*words)
    first.label(["im000010.png"], A, "ada")
    again = open_it(f"resume={first.run}", "ui.port=0")
    assert list(again.source.ids) == list(first.source.ids)
    assert again.labels == first.labels
    with pytest.raises(ConfigError, match="dataset=demo"):
        open_it(f"resume={first.run}", "dataset=demo")
    with pytest.raises(StorageError, match="nowhere"):
        open_it("resume=nowhere")


@pytest.mark.parametrize("word", ["ui.prot=1", "dataset.anomaly=merger"])
def test_a_wrong_key_or_an_anomaly_class_is_refused_in_one_line(call_main, words, word, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {"ui.prot=1": "ui.port"}.get(word, word) in call_main(module.main, *words, word).error_line


def test_a_missing_archive_leaves_no_run_folder(open_it, words, tmp_path):
    wrong = [word if not word.startswith("data.root") else "data.root=nowhere" for word in words]
    with pytest.raises(Exception, match="nowhere"):
        open_it(*wrong)
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.slow
def test_a_training_joins_the_ranking_and_a_failure_is_shown(open_it, words, wait_for):
    service = open_it(*words)
    service.training.start()
    wait_for(lambda: not service.training.running, 240)
    status = service.training.status()
    assert (status.state, status.cycle, status.step) == ("finished", 1, 2), status
    wait_for(lambda: service.summary().modes == ("live", "trained", "both"), 10)
    assert service.page(Query()).tiles[0].score is not None
    service.label(["im000010.png"], A, "ada")  # a reason to train again
    (service.run / "config.yaml").write_text("algorithm: {")
    service.training.start()
    wait_for(lambda: not service.training.running, 240)
    assert service.training.status().state == "failed"
    assert "config.yaml is corrupt" in service.training.status().message
    assert service.labels["im000010.png"] is A
