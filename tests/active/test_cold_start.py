"""Runs that begin without a label."""

import json
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import write_photos

from anomalymatch import run
from anomalymatch.active.cold_start import ColdStart, KCentreOrder, RandomOrder
from anomalymatch.active.run_folder import RunReader
from anomalymatch.algorithms.base import Learner
from anomalymatch.build import build_loop
from anomalymatch.config import compose
from anomalymatch.data.label_log import LabelLog
from anomalymatch.data.task import make_task
from anomalymatch.types import Label

METHODS = ("knn", "msc", "mahalanobis", "pca_residual", "diverse", "mixed", "random")


@pytest.fixture
def photos(tmp_path):
    """Thirty dark images, every fifth with a bright square, and one that is damaged; nothing says which is what."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_photos([folder / f"{i:02d}.png" for i in range(30)])
    (folder / "damaged.png").write_bytes(b"\x89PNG")
    return folder


def benchmark(tiny_job, algorithm):
    """Return the tiny job with an algorithm that has no batches."""
    return [f"algorithm={algorithm}", "oracle=top_k", *(w for w in tiny_job if not w.startswith("algorithm"))]


@pytest.fixture
def own(tiny_model, photos):
    """The overrides of a run on `photos`."""
    return ["dataset=folder", f"data.root={photos}", *tiny_model]


def scores(path, cycle):
    return RunReader(path).ranking(cycle)


# --- algorithms that need no label ------------------------------------------------------------------------------


def test_own_images_are_ranked_without_any_label(command, own, tmp_path):
    outcome = command(*own, "algorithm=knn", "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    assert "No new labels since cycle 1 and nobody to ask" in " ".join(outcome.err.split())
    out = tmp_path / "out"
    assert len(scores(out, 1)) == 30
    assert [r["id"] for r in pq.read_table(out / "rejects.parquet").to_pylist()] == ["damaged.png"]
    assert (out / "cycles" / "01" / "top64.png").stat().st_size > 10_000
    assert (out / "report.html").is_file()
    row = json.loads((out / "cycles" / "01" / "metrics.json").read_text())
    assert (row["labels"], row["found"]) == (0, 0)
    before = scores(out, 1).logits
    assert command("resume=out").code == 0
    np.testing.assert_array_equal(scores(out, 1).logits, before)
    assert RunReader(out).finished_cycles() == 1


# --- cold starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["knn", "mixed"])
def test_the_learner_replaces_the_cold_start_once_both_classes_are_labelled(
    command, own, tmp_path, method, without_pictures
):
    words = [*own, "algorithm=probe", f"al.cold_start={method}", "al.cycles=3", "hydra.run.dir=out"]
    assert command(*words).code == 0
    out = tmp_path / "out"
    assert len(scores(out, 1)) == 30
    first = out / "cycles" / "01"
    assert (first / "cold_start").is_file()
    assert not (first / "weights.safetensors").exists()

    log = LabelLog(out / "labels.sqlite")  # a person finds no anomaly at first
    log.append({"01.png": Label.NORMAL, "02.png": Label.NORMAL}, annotator="ada", cycle=1)
    log.close()
    assert command("resume=out").code == 0
    assert (out / "cycles" / "02" / "cold_start").is_file()

    log = LabelLog(out / "labels.sqlite")
    log.append({"00.png": Label.ANOMALY}, annotator="ada", cycle=2)
    log.close()
    assert command("resume=out").code == 0
    assert not (out / "cycles" / "03" / "cold_start").exists()
    assert (out / "cycles" / "03" / "weights.safetensors").is_file()
    assert set(scores(out, 3).restrict({f"{i:02d}.png" for i in range(1, 30)}).top(5)) == {
        f"{i:02d}.png" for i in range(5, 30, 5)
    }


def test_the_report_mentions_a_ranking_by_the_cold_start(command, own, tmp_path):
    command(*own, "algorithm=probe", "al.cold_start=random", "hydra.run.dir=out")
    said = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the last ranking is that of the cold start" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_cold_start_chooses_the_first_labels_of_a_benchmark(
    tiny_job, tmp_path, method, comparable, without_pictures, events
):
    words = [*benchmark(tiny_job, "probe"), f"al.cold_start={method}", "al.budget=6", "al.cycles=3"]
    rows = run(*words, folder=tmp_path / "whole")
    assert [row["labels"] for row in rows] == [6, 12, 18]
    start = [event.id for event in events(tmp_path / "whole") if event.annotator == "start"]
    loop = build_loop(compose(*words))
    chosen = loop.learner.first(loop._pool(1, {}), loop.task.pool, 6)
    assert start == chosen
    assert not set(start) & set(loop.task.holdout)
    for cycle, row in enumerate(rows, 1):
        warm = 0 < row["found"] < row["labels"]
        assert (tmp_path / "whole" / "cycles" / f"{cycle:02d}" / "cold_start").exists() is not warm
        assert ("probe_ap" in row) is False  # the probe itself is the algorithm
    run(*words[:-1], "al.cycles=1", folder=tmp_path / "half")
    run(*words, folder=tmp_path / "half")
    assert comparable(tmp_path / "half") == comparable(tmp_path / "whole")


def test_no_probe_is_reported_without_both_classes(tiny_job, tmp_path, without_pictures):
    words = [*tiny_job, "oracle=top_k", "al.cold_start=random", "al.budget=1", "al.cycles=1"]
    (row,) = run(*words, folder=tmp_path / "run")
    assert "probe_ap" not in row
    assert "ap" in row


def test_an_algorithm_that_needs_no_labels_ranks_from_the_first_cycle(tiny_job, tmp_path, without_pictures):
    words = [*benchmark(tiny_job, "knn"), "al.cold_start=random", "al.budget=2", "al.cycles=1"]
    run(*words, folder=tmp_path / "run")
    assert (tmp_path / "run" / "cycles" / "01" / "novelty.safetensors").is_file()
    assert not (tmp_path / "run" / "cycles" / "01" / "cold_start").exists()


def test_a_cold_start_takes_its_settings_from_its_file_and_the_rest_from_the_job(tiny_job):
    learner = build_loop(compose(*tiny_job, "al.cold_start=msc", "trainer.workers=1", "seed=3")).learner
    assert isinstance(learner, ColdStart)
    cold = learner.cold
    assert (cold.epochs, cold.workers, cold.seed) == (compose("algorithm=msc").algorithm.learner.epochs, 1, 3)
    assert cold.embedding is learner.learner.embedding


# --- orders without a distance ----------------------------------------------------------------------------------


RANDOM, K_CENTRE = RandomOrder, partial(KCentreOrder, centres=200, candidates=5000)


@pytest.mark.parametrize("kind", [RANDOM, K_CENTRE])
def test_orders_follow_from_the_seed_without_unreadable_images(kind, make_source, make_embedding, tmp_path):
    task = make_task(make_source(60, unreadable={"im000007"}, truth=None))
    embedding = make_embedding(task.source)
    first, second, other = (kind(embedding, seed=seed) for seed in (0, 0, 2))
    assert isinstance(first, Learner)
    assert first.rank().top(60) == second.rank().top(60) != other.rank().top(60)
    assert [reject.id for reject in first.rank().rejects] == ["im000007"]
    assert len(first.rank()) == 59
    mixed = ["im000009", "im000007", "im000002"]
    ranking = first.rank(mixed)
    assert (ranking.ids, [reject.id for reject in ranking.rejects]) == (["im000009", "im000002"], ["im000007"])
    assert ((first.rank().scores > 0) & (first.rank().scores < 1)).all()
    assert len(first.rank([])) == 0
    first.save(tmp_path)
    first.restore(tmp_path)


def test_diverse_images_are_less_similar_than_random_ones(make_source, make_embedding):
    embedding = make_embedding(make_source(200, truth=None))

    def nearest_two(kind):
        top = embedding.features.take(kind(embedding, seed=0).rank().top(20))
        return np.linalg.norm(top[:, None] - top[None], axis=2)[np.triu_indices(20, 1)].min()

    assert nearest_two(K_CENTRE) > nearest_two(RANDOM)


@pytest.mark.parametrize("changed", [{"centres": 5}, {"candidates": 30}])
def test_each_setting_of_the_diverse_order_changes_it(make_source, make_embedding, changed):
    embedding = make_embedding(make_source(200, truth=None))
    orders = [K_CENTRE(embedding, seed=0, **settings).rank().top(40) for settings in ({}, changed)]
    assert orders[0] != orders[1]
