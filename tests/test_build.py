import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

import anomalymatch as am
from anomalymatch.active.oracles import PaperOracle, TopKOracle
from anomalymatch.active.strategies import (
    Auto,
    Distinct,
    Diverse,
    ExpectedDiscovery,
    Mixture,
    PerCluster,
    random,
    top,
    uncertain,
)
from anomalymatch.algorithms.fixmatch.learner import FixMatchLearner
from anomalymatch.algorithms.fixmatch.weighting import FixedThreshold, FlexMatch, FreeMatch, SoftMatch
from anomalymatch.algorithms.probe.learner import ProbeLearner
from anomalymatch.build import build_embedding, build_loop, build_source, build_task, make_learner, open_task
from anomalymatch.config import compose
from anomalymatch.errors import AnomalyMatchError, ConfigError, DataError


@pytest.fixture
def tiny(tiny_job):
    return lambda *words: compose(*tiny_job, *words)


def test_ten_lines_do_what_the_command_does(probe_job, tmp_path, without_pictures):
    data = [w for w in probe_job if w.startswith(("dataset.", "data."))]
    model = [w for w in probe_job if w.startswith(("model.", "data.", "inference.", "dataset.image_size"))]
    task = am.open_task("demo", *data)
    labels = am.initial_labels(task, anomalies=3, normals=10, seed=0)
    learner = am.make_learner("probe", task, *model)
    learner.fit(labels)
    ranking = learner.rank([id_ for id_ in task.pool if id_ not in labels])
    (row,) = am.run(*probe_job, "al.cycles=1", folder=tmp_path / "run")
    assert am.evaluate(ranking, task).ap == pytest.approx(row["ap"])
    assert set(ranking.top(5)) <= set(task.pool) - set(labels)


def test_a_subclass_that_loads_images_is_a_source(make_source, tiny_job):
    class Mine(am.ImageSource):
        def __init__(self):
            ids = [f"m{i}" for i in range(40)]
            truth = {id_: "odd" if i % 8 == 0 else "plain" for i, id_ in enumerate(ids)}
            super().__init__(name="mine", ids=ids, fingerprint="mine-1", truth=truth)

        def load(self, position):
            return np.full((20, 30, 3), 200 if position % 8 == 0 else 20, dtype=np.uint8)

    task = am.make_task(Mine(), anomaly="odd")
    model = [w for w in tiny_job if w.startswith(("model.", "data.", "inference.", "dataset.image_size"))]
    learner = make_learner("probe", task, *model)
    learner.fit(am.initial_labels(task, anomalies=1, normals=3, seed=0))
    assert am.evaluate(learner.rank(task.pool), task).auroc == 1.0


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("dataset.anomaly=unicorn", "demo has no class 'unicorn' for dataset.anomaly: choose from"),
        ("dataset.anomaly=7", "demo has no class '7'"),
        ("dataset.anomaly=[lens_arc,unicorn]", "demo has no class 'unicorn'"),
        ("dataset.holdout=2", "dataset.holdout is 2.0: it must lie between"),
        ("dataset.prevalence=abc", "dataset.prevalence=abc is not a number"),
        ("dataset.prevalence=0", "dataset.prevalence is 0.0"),
        ("dataset.source.rare=unicorn", "there is no rare class 'unicorn'"),
        ("seed=-1", "seed is -1: it cannot be negative"),
        ("model.name=nosuch", "timm has no model 'nosuch'"),
        ("dataset.image_size=8", "model.image_size is 8: it must be at least 16 pixels"),
        ("model.weights=/nowhere.pth", "model.weights=/nowhere.pth is neither a file nor one of"),
        ("al.cycles=0", "al.cycles is 0: it must be at least 1"),
        ("al.budget=-1", "al.budget is -1: it must be at least 1"),
        ("al.strategy.name=best", "al.strategy.name is 'best': choose one of top, uncertain, random, mixture, dist"),
        ("inference.precision=fp8", "inference.precision is 'fp8': choose one of auto, fp32, bf16"),
        ("inference.workers=0", "must be at least 1"),
        ("augment.factor=[1.0]", "augment.factor is [1.0]: it must be [low, high] within 0 to 10"),
        ("augment.flip=2.0", "augment.flip is 2.0: it must lie between 0 and 1"),
        ("algorithm.learner.loss.teacher=parrot", "algorithm.learner.loss.teacher is 'parrot': choose one of"),
        ("algorithm.learner.loss.alignment.prior=1.0", "algorithm.learner.loss.alignment.prior is 1.0: it must lie in"),
        ("trainer.iterations=0", "algorithm.learner.batch.iterations is 0: it must be at least 1"),
    ],
)
def test_a_wrong_value_is_one_error_in_our_own_words(tiny, word, cause):
    def build():
        config = tiny(word)
        loop = build_loop(config)
        assert loop.task.source.truth
        assert build_embedding(config, loop.task).spec

    with pytest.raises(AnomalyMatchError) as error:
        build()
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
def test_the_algorithms_are_one_training_with_another_weighting(tiny, algorithm, weighting, consistency):
    loop = build_loop(tiny(f"algorithm={algorithm}"))
    assert isinstance(loop.learner, FixMatchLearner)
    made = loop.learner.loss.make_weighting(7)
    assert type(made) is weighting
    assert made.pool == 7
    assert loop.learner.loss.consistency == consistency
    assert not loop.learner.loss.make_alignment().aligns
    aligned = build_loop(tiny(f"algorithm={algorithm}", "algorithm.learner.loss.alignment.prior=0.2")).learner
    assert aligned.loss.make_alignment().prior.tolist() == pytest.approx([0.8, 0.2])


def test_a_run_folder_from_before_the_weightings_goes_on_as_it_began():
    """Its configuration names the specification where it was then, and nothing of what came later."""
    node = OmegaConf.create(OmegaConf.to_container(compose("algorithm=fixmatch").algorithm.learner.loss, resolve=True))
    now = instantiate(node)
    for key in ("weighting", "alignment", "consistency", "rampup"):
        del node[key]
    node._target_ = "anomalymatch.algorithms.fixmatch.module.FixMatchSpec"
    before = instantiate(node)
    assert type(before) is type(now)
    assert type(before.make_weighting(3)) is type(now.make_weighting(3))
    for key in ("consistency", "rampup", "threshold"):
        assert getattr(before, key) == getattr(now, key)
    assert not before.make_alignment().aligns


def test_images_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"dataset=folder needs data\.root=PATH"):
        open_task("folder")
    with pytest.raises(DataError, match="expected a folder with images, found nothing"):
        open_task("folder", f"data.root={tmp_path / 'nothing'}")
    with pytest.raises(ConfigError, match="there is no dataset=flickr"):
        open_task("flickr")


def test_the_baseline_is_the_probe_unless_it_is_the_learner_or_unwanted(tiny, probe_job):
    assert isinstance(build_loop(tiny()).baseline, ProbeLearner)
    assert build_loop(tiny("al.compare_probe=false")).baseline is None
    assert build_loop(compose(*probe_job)).baseline is None


def test_a_setting_of_another_algorithm_is_one_clear_error(probe_job):
    config = compose(*probe_job)
    with open_dict(config):
        config.algorithm.learner.batch = {"labelled": 8}
    with pytest.raises(ConfigError, match=r"algorithm=probe has no setting algorithm\.learner\.batch, which"):
        build_loop(config)


def test_oracles_and_strategies_come_by_name(tiny):
    assert isinstance(build_loop(tiny("oracle=paper_oracle")).oracle, PaperOracle)
    for name, strategy in {"top": top, "uncertain": uncertain, "random": random}.items():
        oracle = build_loop(tiny("oracle=top_k", f"al.strategy.name={name}")).oracle
        assert isinstance(oracle, TopKOracle)
        assert oracle.strategy is strategy
    diverse = build_loop(tiny("oracle=top_k", "al.strategy.name=diverse", "al.strategy.candidates=7")).oracle.strategy
    assert isinstance(diverse, Diverse)
    assert diverse.candidates == 7
    distinct = build_loop(
        tiny("oracle=top_k", "al.strategy.name=distinct", "al.strategy.similarity=0.9")
    ).oracle.strategy
    assert isinstance(distinct, Distinct)
    assert (distinct.candidates, distinct.similarity) == (10, 0.9)
    auto = build_loop(tiny("oracle=top_k", "al.strategy.name=auto", "al.strategy.similarity=0.9")).oracle.strategy
    assert isinstance(auto, Auto)
    assert (auto.distinct.similarity, auto.diverse.candidates) == (0.9, 10)
    expected = build_loop(tiny("oracle=top_k", "al.strategy.name=expected", "al.strategy.horizon=40")).oracle.strategy
    assert isinstance(expected, ExpectedDiscovery)
    assert (expected.candidates, expected.horizon) == (10, 40)
    mixture = build_loop(tiny("oracle=top_k", "al.strategy.name=mixture", "al.strategy.explore=0.5")).oracle.strategy
    assert isinstance(mixture, Mixture)
    assert mixture.explore == 0.5
    kinds = build_loop(tiny("oracle=top_k", "al.strategy.name=per_cluster", "seed=3")).oracle.strategy
    assert isinstance(kinds, PerCluster)
    assert (kinds.candidates, kinds.divide.seed) == (10, 3)
    assert build_loop(tiny("dataset.anomaly=null")).oracle is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("oracle=paper_oracle", "al.strategy.name=distinct"), "this oracle chooses by the truth; add oracle=top_k"),
        (("dataset.anomaly=null", "al.strategy.name=auto"), "it is for a benchmark, whose truth answers what it asks"),
        (("oracle=top_k", "al.strategy.name=distinct"), ""),
        (("oracle=paper_oracle",), ""),
        (("dataset.anomaly=null",), ""),
    ],
)
def test_a_strategy_that_nobody_asks_is_told_of(tiny, caplog, words, told):
    build_loop(tiny(*words))
    assert ("is not used" in caplog.text) == bool(told)
    assert told in caplog.text


def test_images_that_would_not_be_looked_at_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"data\.root=photos is not used by dataset=demo: add dataset=auto"):
        build_task(tiny("data.root=photos"))


def test_a_source_may_call_the_folder_what_it_likes(tiny, make_source, monkeypatch):
    from anomalymatch import build

    config, own = tiny("data.root=photos"), make_source(3)
    with open_dict(config.dataset):
        config.dataset.source = {"folder": "${data.root}/raw"}
    monkeypatch.setattr(build, "build", lambda node: own if node.folder == "photos/raw" else None)
    assert build_source(config) is own


def test_an_audit_that_nobody_answers_is_told_of(tiny, caplog):
    build_loop(tiny("dataset.anomaly=null", "al.audit=9"))
    assert "al.audit=9 is not used" in caplog.text


@pytest.mark.parametrize("words", [("oracle=paper_oracle",), ("dataset.anomaly=null",)])
def test_a_strategy_that_there_is_not_is_refused_even_where_it_is_not_used(tiny, words):
    with pytest.raises(ConfigError, match=r"al\.strategy\.name is 'best': choose one of top, "):
        build_loop(tiny(*words, "al.strategy.name=best"))


def test_every_knob_of_the_demo_set_changes_the_task(tiny):
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
    "initial.anomalies": "al.initial.anomalies=4",
    "initial.normals": "al.initial.normals=12",
    "compare_probe": "al.compare_probe=false",
    "audit": "al.audit=30",
    "cold_start": "al.cold_start=random",
    "strategy.name": "al.strategy.name=uncertain",
    "strategy.candidates": "al.strategy.candidates=2",
    "strategy.similarity": "al.strategy.similarity=0.3",
    "strategy.explore": "al.strategy.explore=0.75",
    "strategy.horizon": "al.strategy.horizon=1",
    "seed": "seed=1",
    "oracle": "oracle=paper_oracle",
}


def test_every_knob_of_the_protocol_is_turned_below():
    al = compose().al
    names = {k for k in al if k not in ("initial", "strategy")} | {f"initial.{k}" for k in al.initial}
    assert names | {f"strategy.{k}" for k in al.strategy} == set(PROTOCOL) - {"seed", "oracle"}


@pytest.mark.slow
@pytest.mark.parametrize("knob", PROTOCOL)
def test_every_knob_of_the_protocol_changes_the_run(knob, tiny_job, probe_job, tmp_path, without_pictures):
    shared = tiny_job if knob in ("compare_probe", "pool_size") else probe_job
    shared = [*shared, "oracle=paper_oracle" if knob == "pool_size" else "oracle=top_k"]
    needed = {"candidates": "diverse", "similarity": "distinct", "explore": "mixture", "horizon": "expected"}
    if (name := needed.get(knob.removeprefix("strategy."))) is not None:
        shared.append(f"al.strategy.name={name}")
    both = []
    for name, words in (("plain", []), ("changed", [PROTOCOL[knob]])):
        rows = am.run(*shared, *words, folder=tmp_path / name)
        said = (tmp_path / name / "labels.csv").read_text()
        both.append((said, [{k: v for k, v in row.items() if k != "seconds"} for row in rows]))
    assert both[0] != both[1]
