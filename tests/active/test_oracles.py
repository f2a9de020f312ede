import numpy as np
import pytest

from anomalymatch.active.oracles import Oracle, PaperOracle, TopKOracle
from anomalymatch.active.strategies import Random, Top
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label

RNG = np.random.default_rng(0)


@pytest.fixture
def ranking(task):
    """The pool, by a score that falls with the number of the image; every tenth image is rare."""
    return Ranking(task.pool, -np.arange(float(len(task.pool))))


def rare(task):
    return [id_ for id_ in task.pool if id_ in task.anomalies]


def normal(task):
    return [id_ for id_ in task.pool if id_ not in task.anomalies]


@pytest.mark.parametrize(("budget", "anomalies", "normals"), [(4, 2, 2), (5, 3, 2), (1, 1, 0)])
def test_paper_oracle_labels_the_top_of_both_halves(task, ranking, budget, anomalies, normals):
    oracle = PaperOracle(task, Top())
    assert isinstance(oracle, Oracle)
    answers = oracle(ranking, frozenset(task.pool), budget, rng=RNG)
    assert answers == {
        **dict.fromkeys(rare(task)[:anomalies], Label.ANOMALY),
        **dict.fromkeys(normal(task)[:normals], Label.NORMAL),
    }


def test_paper_oracle_labels_the_current_pool_only(task, ranking):
    pool = frozenset(task.pool[40:])
    answers = PaperOracle(task, Top())(ranking, pool, 4, rng=RNG)
    assert set(answers) <= pool
    assert sorted(answers.values()) == [Label.ANOMALY] * 2 + [Label.NORMAL] * 2


@pytest.mark.parametrize("budget", [1, 5, 30])
def test_top_k_labels_the_top_also_outside_the_pool(task, ranking, budget):
    answers = TopKOracle(task, Top())(ranking, frozenset(), budget, rng=RNG)
    assert list(answers) == ranking.top(budget)
    assert answers == {id_: task.label(id_) for id_ in ranking.top(budget)}
    assert set(answers.values()) <= {Label.ANOMALY, Label.NORMAL}


def test_top_k_uses_its_strategy(task, ranking):
    answers = TopKOracle(task, Random())(ranking, frozenset(), 10, rng=np.random.default_rng(3))
    assert list(answers) == Random()(ranking, 10, rng=np.random.default_rng(3))


@pytest.mark.parametrize("oracle", [PaperOracle, TopKOracle])
def test_an_oracle_labels_only_images_of_the_ranking(task, ranking, oracle):
    unlabelled = ranking.restrict(task.pool[10:30])
    answers = oracle(task, Top())(unlabelled, frozenset(task.pool), 100, rng=RNG)
    assert set(answers) == set(task.pool[10:30])
