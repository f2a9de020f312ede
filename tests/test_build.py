import re
from functools import cache, partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import open_dict
from PIL import Image
from torch.utils.data import TensorDataset

import anomalymatch as am
from anomalymatch.active.oracles import PaperOracle, TopKOracle
from anomalymatch.active.run_folder import RunReader
from anomalymatch.algorithms.fixmatch.learner import FixMatchLearner
from anomalymatch.algorithms.fixmatch.weighting import FixedThreshold, FlexMatch, FreeMatch, SoftMatch
from anomalymatch.algorithms.probe.learner import ProbeLearner
from anomalymatch.build import build_detector, build_embedding, build_loop, build_strategy, make_learner
from anomalymatch.build_images import build_source, build_task, open_task
from anomalymatch.config import check_overrides, compose
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError
from anomalymatch.files import write_text


@pytest.fixture
def tiny(tiny_job):
    return partial(compose, *tiny_job)


def test_the_python_interface_gives_the_numbers_of_the_command(probe_job, tiny_model, tmp_path, without_pictures):
    task = am.open_task("demo", *(word for word in probe_job if word.startswith(("dataset.", "data."))))
    labels = am.initial_labels(task, anomalies=3, normals=10, seed=0)
    learner = am.make_learner("probe", task, *tiny_model)
    learner.fit(labels)
    ranking = learner.rank([id_ for id_ in task.pool if id_ not in labels])
    (row,) = am.run(*probe_job, "al.cycles=1", folder=tmp_path / "run")
    assert am.evaluate(ranking, task).ap == pytest.approx(row["ap"])
    assert set(ranking.top(5)) <= set(task.pool) - set(labels)


def test_a_subclass_with_load_is_a_source(tiny_model):
    class Mine(am.ImageSource):
        def __init__(self):
            ids = [f"m{i}" for i in range(40)]
            truth = {id_: "odd" if i % 8 == 0 else "plain" for i, id_ in enumerate(ids)}
            super().__init__(name="mine", ids=ids, fingerprint="mine-1", truth=truth)

        def load(self, position):
            return np.full((20, 30, 3), 200 if position % 8 == 0 else 20, dtype=np.uint8)

    task = am.make_task(Mine(), anomaly="odd")
    learner = make_learner("probe", task, *tiny_model)
    learner.fit(am.initial_labels(task, anomalies=1, normals=3, seed=0))
    assert am.evaluate(learner.rank(task.pool), task).auroc == 1.0


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("dataset.anomaly=unicorn", "demo has no class 'unicorn' for dataset.anomaly: choose from"),
        ("dataset.anomaly=7", "demo has no class '7'"),
        ("dataset.anomaly=[lens_arc,unicorn]", "demo has no class 'unicorn'"),
        ("dataset.holdout=2", "dataset.holdout is 2.0"),
        ("dataset.prevalence=abc", "dataset.prevalence is abc"),
        ("dataset.prevalence=0", "dataset.prevalence is 0.0"),
        ("dataset.source.rare=unicorn", "dataset.source.rare is 'unicorn'"),
        ("seed=-1", "seed is -1"),
        ("model.name=nosuch", "nosuch"),
        ("dataset.image_size=8", "model.image_size is 8"),
        ("model.weights=/nowhere.pth", "model.weights=/nowhere.pth"),
        ("al.cycles=0", "al.cycles is 0"),
        ("al.budget=-1", "al.budget is -1"),
        ("al.candidates=some", "al.candidates is 'some': choose one of all, neighbours"),
        ("al.neighbours=0", "al.neighbours is 0"),
        ("al.strategy.name=best", "al/strategy=best"),
        ("inference.precision=fp8", "inference.precision is 'fp8'"),
        ("inference.workers=0", "inference.workers is 0"),
        ("augment.zoom=[1.0]", "augment.zoom is [1.0]"),
        ("augment.noise=2.0", "augment.noise is 2.0"),
        ("algorithm.learner.loss.teacher=parrot", "algorithm.learner.loss.teacher is 'parrot'"),
        ("algorithm.learner.loss.alignment.prior=1.0", "algorithm.learner.loss.alignment.prior is 1.0"),
        ("trainer.iterations=0", "algorithm.learner.batch.iterations is 0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(tiny, word, cause):
    with pytest.raises(AnomalyMatchError) as error:
        _ = build_loop(tiny(word)).learner.embedding.spec
    assert cause in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "weighting", "consistency"),
    [
        ("fixmatch", FixedThreshold, "cross_entropy"),
        ("fixmatch_reference", FixedThreshold, "cross_entropy"),
        ("flexmatch", FlexMatch, "cross_entropy"),
        ("freematch", FreeMatch, "cross_entropy"),
        ("softmatch", SoftMatch, "cross_entropy"),
        ("meanteacher", FixedThreshold, "squared_error"),
    ],
)
def test_variants_of_fixmatch_differ_in_the_weighting(tiny, algorithm, weighting, consistency):
    loop = build_loop(tiny(f"algorithm={algorithm}"))
    assert isinstance(loop.learner, FixMatchLearner)
    loss = loop.learner.recipe.loss
    made = loss.make_weighting(7)
    assert (type(made), made.pool, loss.consistency) == (weighting, 7, consistency)
    assert not loss.make_alignment().aligns
    aligned = build_loop(tiny(f"algorithm={algorithm}", "algorithm.learner.loss.alignment.prior=0.2")).learner
    assert aligned.recipe.loss.make_alignment().prior.tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["folder"], DataError, r"data\.root=PATH"),
        (["folder", "data.root=nothing"], DataError, "nothing"),
        (["flickr"], ConfigError, "dataset=flickr"),
    ],
)
def test_missing_images_are_reported(words, kind, message):
    with pytest.raises(kind, match=message):
        open_task(*words)


def test_the_baseline_is_the_probe_unless_it_is_the_learner_or_switched_off(tiny):
    assert isinstance(build_loop(tiny()).baseline, ProbeLearner)
    assert build_loop(tiny("al.compare_probe=false")).baseline is None
    assert build_loop(compose(*(w for w in tiny.args if "algorithm" not in w), "algorithm=probe")).baseline is None


def test_a_setting_of_another_algorithm_is_reported(probe_job):
    config = compose(*probe_job)
    with open_dict(config):
        config.algorithm.learner.batch = {"labelled": 8}
    with pytest.raises(ConfigError, match=r"algorithm=probe has no setting algorithm\.learner\.batch, which"):
        build_loop(config)


def test_oracles_are_chosen_by_name(tiny):
    assert isinstance(build_loop(tiny("oracle=paper_oracle")).oracle, PaperOracle)
    assert isinstance(build_loop(tiny("oracle=top_k")).oracle, TopKOracle)
    assert build_loop(tiny("dataset.anomaly=null")).oracle is None


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("top", "", {}),
        ("uncertain", "", {}),
        ("random", "", {}),
        ("mixture", "al.strategy.explore=0.5", {"explore": 0.5}),
        ("diverse", "al.strategy.candidates=7", {"candidates": 7}),
        ("distinct", "al.strategy.similarity=0.9", {"candidates": 10, "similarity": 0.9}),
        ("auto", "al.strategy.similarity=0.9", {"distinct.similarity": 0.9, "diverse.candidates": 10}),
        ("expected", "al.strategy.prior=3.0", {"candidates": 10, "followed": 2000, "prior": 3.0}),
        ("per_cluster", "seed=3", {"candidates": 10, "group_images.seed": 3, "group_images.spec.references": 100}),
    ],
)
def test_strategies_are_chosen_by_name_and_take_their_settings(tiny, name, words, expected):
    config = tiny("oracle=top_k", f"al.strategy.name={name}", *words.split())
    strategy = build_strategy(config, build_embedding(config, build_task(config)))
    assert type(strategy).__name__.lower() in (name.replace("_", ""), "expecteddiscovery")
    assert {key: attrgetter(key)(strategy) for key in expected} == expected


OWN_STRATEGY = """
class Lowest:
    def __init__(self, embedding, skip):
        self.embedding, self.skip = embedding, skip

    def __call__(self, ranking, count, *, rng, **_):
        return ranking.top(len(ranking))[::-1][self.skip:][:count]
"""


def test_config_dir_adds_a_strategy_and_a_cold_start(
    command, probe_job, tmp_path, monkeypatch, without_pictures, events
):
    (tmp_path / "own_strategy.py").write_text(OWN_STRATEGY)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "name: lowest\n_target_: own_strategy.Lowest\n_partial_: true\nskip: 2\n"
    write_text(tmp_path / "conf/al/strategy/lowest.yaml", own)
    write_text(tmp_path / "conf/al/cold_start/shuffle.yaml", "defaults: [random, _self_]\nname: shuffle\n")
    words = ["oracle=top_k", "al.strategy.name=lowest", "al.cold_start=shuffle", "al.strategy.skip=1"]
    outcome = command("--config-dir", str(tmp_path / "conf"), *probe_job, *words, "hydra.run.dir=out")
    assert outcome.code == 0, outcome.err
    first = [event.id for event in events(tmp_path / "out") if event.cycle == 0]
    asked = [event.id for event in events(tmp_path / "out") if event.cycle == 1]
    assert len(first) == 4
    task = build_task(compose(*probe_job))
    rest = RunReader(tmp_path / "out").ranking(1).restrict([id_ for id_ in task.pool if id_ not in first])
    assert asked == rest.top(len(rest))[::-1][1:5]


def test_a_short_form_in_a_file_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    for key, text in {"al.strategy.name": "strategy: {name: auto}", "al.cold_start": "cold_start: knn"}.items():
        file.write_text(f"# @package _global_\nal:\n  {text}\n")
        with pytest.raises(ConfigError, match=key):
            check_overrides(["+experiment=mine"], folder=tmp_path)
    file.write_text("# @package _global_\ndefaults: [override /al/strategy: auto]\n")
    assert check_overrides(["+experiment=mine"], folder=tmp_path).al.strategy.name == "auto"


@pytest.mark.parametrize("cold_start", ["knn", "mixed"])
def test_the_settings_of_the_algorithm_reach_a_cold_start_by_the_same_algorithm(tiny, cold_start):
    def neighbours(*words):
        words = [*words, "algorithm.learner.detector.neighbours=3", f"al.cold_start={cold_start}"]
        config = compose(*(w for w in tiny.args if not w.startswith("algorithm")), *words)
        cold = build_loop(config).learner.cold
        found = build_detector(config, compose(name="label").ui.novelty).neighbours
        assert found == getattr(cold, "novelty", cold).detector.neighbours
        return found

    own = "al.cold_start.learner" if cold_start == "knn" else "al.cold_start.novelty.learner"
    assert neighbours("algorithm=knn") == 3
    assert neighbours("algorithm=msc") == 10
    assert neighbours("algorithm=msc", f"{own}.detector.neighbours=4") == 4


def test_the_page_has_a_detector_where_the_cold_start_has_none(tiny):
    default = compose("ui.novelty.learner.detector.neighbours=7", name="label").ui.novelty
    for name in ("none", "random", "diverse"):
        assert build_detector(tiny(f"al.cold_start={name}"), default).neighbours == 7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("oracle=paper_oracle", "al.strategy.name=distinct"), "oracle=top_k"),
        (("dataset.anomaly=null", "al.strategy.name=auto"), "dataset.anomaly"),
        (("dataset.anomaly=null", "al.audit=9"), "al.audit=9"),
        (("oracle=top_k", "al.strategy.name=distinct"), ""),
        (("oracle=paper_oracle",), ""),
        (("dataset.anomaly=null",), ""),
    ],
)
def test_an_unused_setting_is_reported(tiny, caplog, words, told):
    build_loop(tiny(*words))
    assert ("is not used" in caplog.text) == bool(told)
    assert told in caplog.text


def test_a_data_root_that_the_dataset_does_not_use_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"data\.root=photos is not used by dataset=demo: add dataset=auto"):
        build_task(tiny("data.root=photos"))


def test_a_source_may_use_another_key_for_its_folder(tiny, make_source, monkeypatch):
    from anomalymatch import build_images

    config, own = tiny("data.root=photos"), make_source(3)
    with open_dict(config.dataset):
        config.dataset.source = {"folder": "${data.root}/raw"}
    monkeypatch.setattr(build_images, "build", lambda node: own if node.folder == "photos/raw" else None)
    assert build_source(config) is own


def test_every_key_of_the_demo_dataset_changes_the_task(tiny):
    def fingerprint(*words):
        task = build_task(tiny(*words))
        return task.source.fingerprint, tuple(task.pool), tuple(task.holdout), task.anomalies

    words = [
        "dataset.anomaly=smooth_round",
        "dataset.prevalence=0.02",
        "dataset.holdout=0.4",
        "dataset.source.count=160",
        "dataset.source.size=40",
        "dataset.source.rare=merger",
        "dataset.source.rare_fraction=0.2",
        "dataset.source.seed=1",
    ]
    assert len({fingerprint(), *map(fingerprint, words)}) == 1 + len(words)
    thinned = "dataset.prevalence=0.02"
    assert fingerprint(thinned, "seed=1") != fingerprint(thinned)


# --- no dead knobs in the protocol ------------------------------------------------------------------------------

PROTOCOL = {
    "cycles": "al.cycles=3",
    "budget": "al.budget=6",
    "pool_size": "al.pool_size=20",
    "initial": "al.initial.anomalies=4",
    "initial.normals": "al.initial.normals=12",
    "compare_probe": "al.compare_probe=false",
    "candidates": "al.candidates=neighbours",
    "neighbours": "al.neighbours=3",
    "audit": "al.audit=30",
    "audit_tops": "al.audit_tops=[7]",
    "stopping": "al.stopping.score=0.5",
    "cold_start": "al.cold_start=random",
    "strategy": "al.strategy.name=uncertain",
    "seed": "seed=1",
    "oracle": "oracle=paper_oracle",
}
"""The settings of each strategy and cold start have tests beside those of their classes."""


# tests/active/test_text_ranker.py has the test of `describe`, which needs an image-text model.
assert set(compose().al) - {"describe"} == {key.split(".")[0] for key in PROTOCOL} - {"seed", "oracle"}


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """Function that runs a job, once, and returns its labels, its estimates and its metrics."""

    @cache
    def run(*words):
        folder = tmp_path_factory.mktemp("run")
        rows = am.run(*words, folder=folder)
        texts = [(folder / file).read_text() for file in ("labels.csv", "cycles/02/left.csv")]
        # NaN is no value, and would differ from itself.
        return texts, [{k: v for k, v in row.items() if k != "seconds" and v == v} for row in rows]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("knob", PROTOCOL)
def test_every_key_of_the_protocol_changes_the_run(knob, tiny_job, probe_job, result_of, without_pictures):
    shared = tiny_job if knob in ("compare_probe", "pool_size") else probe_job
    shared = [*shared, "oracle=paper_oracle" if knob == "pool_size" else "oracle=top_k", "al.audit=20"]
    shared += ["al.candidates=neighbours"] * (knob == "neighbours")
    assert result_of(*shared) != result_of(*shared, PROTOCOL[knob])


# --- one call --------------------------------------------------------------------------------------------------


def test_rank_takes_whatever_holds_images_and_leaves_out_those_with_labels(image_folder, tiny_model, tmp_path):
    paths = sorted(map(str, image_folder(20).iterdir()))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    words = [word for word in tiny_model if word.startswith(("model.", "inference.", "data.cache_dir"))]
    labels = ["anomaly", None, "normal", *[None] * 17]
    by_path = {paths[0]: "anomaly", paths[2]: "normal"}
    frame = pd.DataFrame({"size": 1, "file": paths, "mine": labels})
    torchvision = TensorDataset(torch.from_numpy(np.stack(arrays)), torch.zeros(20))
    stack = np.stack(arrays)
    rankings = [
        am.rank(paths, by_path, *words),
        am.rank(frame, "mine", *words),
        am.rank(frame, labels, *words),
        am.rank(tmp_path / "archive", {Path(id_).name: label for id_, label in by_path.items()}, *words),
        am.rank(am.from_paths(paths), labels, *words),
        am.rank(arrays, labels, *words),
        am.rank(stack, {"0": "anomaly", "2": "normal"}, *words),
        am.rank(torch.from_numpy(stack), labels, *words),
        am.rank(torchvision, labels, *words),
    ]
    numbers = [[i for i in range(20) if i not in (0, 2)]] * len(rankings)
    assert [[int(re.search(r"(\d+)(\.png)?$", id_)[1]) for id_ in r.ids] for r in rankings] == numbers
    for ranking in rankings[1:]:
        np.testing.assert_allclose(ranking.logits, rankings[0].logits, atol=1e-5)


def test_rank_without_labels_puts_the_unusual_first_and_refuses_what_it_cannot_open(tiny_model):
    words = [word for word in tiny_model if word.startswith(("model.", "inference.", "data.cache_dir"))]
    rng = np.random.default_rng(0)
    images = rng.integers(100, 110, (20, 32, 32), dtype=np.uint8)
    images[7] = rng.integers(0, 256, (32, 32))
    ranking = am.rank(images, None, *words)
    assert len(ranking) == 20
    assert ranking.top(1) == ["7"]
    with pytest.raises(am.AnomalyMatchError, match="none of the 1 labels is 'normal'"):
        am.rank(images, {"7": "anomaly"}, *words)
    with pytest.raises(am.AnomalyMatchError, match="the name of a column, but the images are no data frame"):
        am.rank(images, "label")
    with pytest.raises(am.AnomalyMatchError, match="has no length or no numbered items"):
        am.rank(7)
    with pytest.raises(am.AnomalyMatchError, match="columns size"):
        am.rank(pd.DataFrame({"size": [1]}))
