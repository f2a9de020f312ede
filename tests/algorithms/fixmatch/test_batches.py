from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalymatch.algorithms.fixmatch.batches import (
    BatchSpec,
    MixedBatches,
    balanced_draws,
    epoch_draws,
    pool_draws,
    pool_weights,
)
from anomalymatch.config import compose
from anomalymatch.data.stream import resize
from anomalymatch.errors import DataError, LabelError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with a new torch
SIZE = 24
DEFAULT = instantiate(compose("dataset=folder", "data.root=unused").augment)
STILL = replace(DEFAULT, flip=0.0, translate=0.0, operations=0, cutout=0.0)
"""Views that change nothing, so that images can be identified."""
SPEC = BatchSpec(
    labelled=4, unlabelled_ratio=2, iterations=5, workers=0, candidates=0, candidate_share=0.0, pool_per_candidate=5
)


def spec(**changes):
    return replace(SPEC, **changes)


def labels_of(source, anomalies=2, normals=6):
    rare = [id_ for id_ in source.ids if source.truth[id_] == "rare"][:anomalies]
    common = [id_ for id_ in source.ids if source.truth[id_] == "common"][:normals]
    return dict.fromkeys(rare, "anomaly") | dict.fromkeys(common, "normal")


@pytest.fixture
def mixed(make_source):
    def make(
        *, count=40, channels=3, unreadable=(), augmentation=None, seed=0, labels=None, pool=None, likely=(), **changes
    ):
        source = make_source(count, size=32, channels=channels, unreadable=unreadable)
        labels = labels_of(source) if labels is None else labels
        pool = [id_ for id_ in source.ids if id_ not in labels] if pool is None else pool
        return MixedBatches(
            source,
            labels,
            pool,
            augmentation=augmentation or DEFAULT,
            spec=spec(**changes),
            image_size=SIZE,
            seed=seed,
            candidates=likely,
        )

    return make


def batches(data):
    return list(data.train_dataloader())


def same(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_shapes_and_types(mixed, channels):
    made = batches(mixed(channels=channels))
    assert len(made) == 5
    for batch in made:
        x_lb, y_lb, x_ulb_w, x_ulb_s, i_ulb = batch
        assert x_lb.shape == (4, channels, SIZE, SIZE)
        assert x_ulb_w.shape == x_ulb_s.shape == (8, channels, SIZE, SIZE)
        assert x_lb.dtype == x_ulb_w.dtype == x_ulb_s.dtype == torch.uint8
        assert y_lb.dtype == i_ulb.dtype == torch.int64
        assert set(y_lb.tolist()) <= {0, 1}
        assert (x_ulb_w != x_ulb_s).any()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # a fork, in Python 3.12 and later
def test_batches_do_not_depend_on_the_number_of_workers(mixed):
    here, there = batches(mixed(workers=0)), batches(mixed(workers=2))
    assert len(here) == len(there) == 5
    assert same(here, there)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_batch_is_divided_among_processes(mixed, processes):
    whole, parts = batches(mixed()), []
    for rank in range(processes):
        data = mixed()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes, current_epoch=0)
        parts.append(batches(data))
    for step, batch in enumerate(whole):
        for i, tensor in enumerate(batch):
            together = torch.stack([part[step][i] for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(together, tensor)


def test_batches_do_not_depend_on_global_random_state(mixed):
    data = mixed()
    first = batches(data)
    torch.rand(3)
    np.random.default_rng().random(3)
    assert same(first, batches(data))
    assert same(first, batches(mixed()))


def test_each_epoch_has_other_draws_and_views_which_follow_from_the_seed(mixed):
    data, epochs = mixed(), []
    loader = data.train_dataloader()
    assert len(loader) == 5
    for epoch in (0, 1, 2, 1):
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=epoch)
        epochs.append(list(loader))
    assert same(epochs[0], batches(mixed()))
    assert same(epochs[1], epochs[3])
    for one, other in pairwise(epochs[:3]):
        assert not any(same([a], [b]) for a, b in zip(one, other, strict=True))
        assert not torch.equal(*(torch.cat([batch.i_ulb for batch in made]) for made in (one, other)))


def test_views_of_one_image_differ_from_draw_to_draw(mixed):
    data = mixed(count=12, iterations=4, labels=None)
    views = {}
    for batch in batches(data):
        for weak, position in zip(batch.x_ulb_w, batch.i_ulb.tolist(), strict=True):
            views.setdefault(position, []).append(weak.numpy().tobytes())
    seen_often = [own for own in views.values() if len(own) >= 4]
    assert seen_often
    assert all(len(set(own)) > 1 for own in seen_often)


def test_positions_and_labels_name_the_images(mixed):
    data = mixed(augmentation=STILL)

    def expected(id_):
        return torch.from_numpy(resize(data.source.read([id_])[0], SIZE, "stretch")).permute(2, 0, 1)

    targets = {expected(id_).numpy().tobytes(): int(label == "anomaly") for id_, label in data.labels.items()}
    for batch in batches(data):
        for weak, strong, position in zip(batch.x_ulb_w, batch.x_ulb_s, batch.i_ulb, strict=True):
            assert torch.equal(weak, expected(data.pool[position]))
            assert torch.equal(strong, weak)
        for image, target in zip(batch.x_lb, batch.y_lb, strict=True):
            assert targets[image.numpy().tobytes()] == target


def test_labelled_images_are_read_once_and_the_pool_when_it_is_drawn(mixed):
    data = mixed(iterations=5)
    batches(data)
    assert data.source.reads == len(data.labels) + 5 * 8


def test_unsure_and_artefact_are_not_used(mixed, make_source):
    labels = labels_of(make_source(40)) | {"im000021": "unsure", "im000022": "artefact"}
    views = mixed(labels=labels).views()[0]
    assert len(views.images) == 8
    assert views.targets.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_candidates_come_more_often_than_others(mixed):
    chosen = ["im000015", "im000021"]
    data = mixed(augmentation=STILL, candidates=2, candidate_share=0.5, likely=chosen)
    own = {data.pool.index(id_) for id_ in chosen}
    for batch in batches(data):
        assert sum(position in own for position in batch.i_ulb.tolist()) >= 4


def test_an_unreadable_image_of_the_pool_is_replaced_by_the_next(mixed):
    data = mixed(unreadable={"im000015", "im000016"}, augmentation=STILL, iterations=8)
    bad = {data.pool.index(id_) for id_ in ("im000015", "im000016")}
    positions = [p for batch in batches(data) for p in batch.i_ulb.tolist()]
    assert not bad & set(positions)
    after = data.pool.index("im000017")
    draws = epoch_draws(len(data.pool), 64, np.random.default_rng([0, 1])).tolist()
    assert positions == [after if p in bad else p for p in draws]


def test_an_unreadable_labelled_image_is_left_out(mixed, make_source):
    labels = labels_of(make_source(40))
    views = mixed(labels=labels, unreadable={"im000000", "im000003"}).views()[0]
    assert views.targets.tolist() == [1, 0, 0, 0, 0, 0]


def test_nothing_readable_is_a_clear_error(mixed, make_source):
    source = make_source(40)
    labels = labels_of(source)
    pool = [id_ for id_ in source.ids if id_ not in labels]
    with pytest.raises(DataError, match="none of 32 images"):
        batches(mixed(unreadable=pool))
    with pytest.raises(LabelError, match="'anomaly'"):
        mixed(unreadable=["im000000", "im000010"]).views()[0]


def test_no_pool_and_no_labels(mixed):
    with pytest.raises(DataError, match="no unlabelled images left"):
        mixed(pool=[])
    with pytest.raises(LabelError, match="at least one anomaly and one normal"):
        batches(mixed(labels={"im000001": "normal"}))


# --- draws -----------------------------------------------------------------------------------------------------


def test_both_classes_come_equally_often():
    targets = np.repeat([1, 0], [5, 495])
    draws = balanced_draws(targets, 20_000, np.random.default_rng(0))
    anomalies = (targets[draws] == 1).sum()
    assert (anomalies - 10_000) ** 2 / 10_000 + (20_000 - anomalies - 10_000) ** 2 / 10_000 < 10.8  # chi-square, 0.1 %
    counts = np.bincount(draws, minlength=500)
    for members, size in ((counts[:5], 5), (counts[5:], 495)):
        expected = 10_000 / size
        chi_square = ((members - expected) ** 2 / expected).sum()
        assert abs(chi_square - (size - 1)) < 4 * np.sqrt(2 * size)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 5))
def test_the_pool_is_drawn_without_replacement(pool, count, seed):
    draws = epoch_draws(pool, count, np.random.default_rng(seed))
    assert len(draws) == count
    counts = np.bincount(draws, minlength=pool)
    assert len(counts) == pool
    assert counts.max() - counts.min() <= 1
    for start in range(0, count, pool):
        one = draws[start : start + pool]
        assert len(set(one.tolist())) == len(one)


def test_each_pass_over_the_pool_is_reshuffled():
    draws = epoch_draws(50, 100, np.random.default_rng(0))
    assert draws[:50].tolist() != draws[50:].tolist() != list(range(50))


@given(st.integers(5, 40), st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 5))
def test_candidates_fill_their_share_of_every_batch_and_the_pool_the_rest(pool, count, share, seed):
    made = spec(iterations=6, candidates=count, candidate_share=share)
    candidates = np.arange(count) * (pool // count)
    rng = np.random.default_rng(seed)
    draws = pool_draws(pool, candidates, made, rng).reshape(6, 8)
    own = round(share * 8)
    counts = np.bincount(draws[:, :own].ravel(), minlength=pool)[candidates]
    assert np.isin(draws[:, :own], candidates).all()
    assert counts.max() - counts.min() <= 1
    plain = epoch_draws(pool, 48, np.random.default_rng(seed)).reshape(6, 8)
    assert (draws[:, own:] == plain[:, own:]).all()


def test_a_fifth_of_a_small_pool_are_candidates():
    pools = {10**6: 1000, 5001: 1000, 5000: 1000, 4999: 1000, 4995: 999, 11: 3, 1: 1, 0: 0}
    assert {pool: spec(candidates=1000).candidates_of(pool) for pool in pools} == pools
    assert spec(candidates=1000, pool_per_candidate=2).candidates_of(11) == 6
    assert SPEC.candidates_of(10**6) == 0


@settings(deadline=None, max_examples=25)  # 160,000 draws each: fewer would be too few for the tolerance
@given(st.integers(5, 60), st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.integers(0, 5))
def test_weighted_mean_over_batches_is_the_mean_over_the_pool(pool, count, share, seed):
    made = spec(iterations=20000, candidates=count, candidate_share=share)
    candidates = np.arange(count) * (pool // max(count, 1))
    draws = pool_draws(pool, candidates, made, np.random.default_rng(seed))
    weights = pool_weights(pool, candidates, made)[draws]
    assert weights.mean() == pytest.approx(1.0, abs=0.02)
    counts = np.bincount(draws, weights=weights, minlength=pool) / weights.sum()
    np.testing.assert_allclose(counts, 1 / pool, rtol=0.2)


def test_the_weights_of_a_pool_by_hand():
    made = spec(candidates=2, candidate_share=0.75)  # six of eight are candidates
    weights = pool_weights(10, np.array([3, 7]), made)
    assert weights[3] == weights[7] == pytest.approx(1 / (0.75 * 5 + 0.25))
    assert np.delete(weights, [3, 7]).tolist() == [4.0] * 8
    assert pool_weights(10, np.array([], dtype=np.int64), made).tolist() == [1.0] * 10
