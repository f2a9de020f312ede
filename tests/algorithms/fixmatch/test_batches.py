import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatches, epoch_draws
from anomalymatch.algorithms.fixmatch.views import Augmentation
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import resize
from anomalymatch.errors import ConfigError, DataError, LabelError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, with a new torch
SIZE = 24
STILL = Augmentation(flip=0.0, translate=0.0, operations=0, cutout=0.0)
"""Views that change nothing, so that images can be told apart."""


def labels_of(source, anomalies=2, normals=6):
    rare = [id_ for id_ in source.ids if source.truth[id_] == "rare"][:anomalies]
    common = [id_ for id_ in source.ids if source.truth[id_] == "common"][:normals]
    return dict.fromkeys(rare, "anomaly") | dict.fromkeys(common, "normal")


@pytest.fixture
def mixed(make_source):
    def make(
        *, count=40, channels=3, unreadable=(), augmentation=None, seed=0, labels=None, pool=None, likely=(), **spec
    ):
        source = make_source(count, size=32, channels=channels, unreadable=unreadable)
        labels = labels_of(source) if labels is None else labels
        pool = [id_ for id_ in source.ids if id_ not in labels] if pool is None else pool
        return MixedBatches(
            source,
            labels,
            pool,
            augmentation=augmentation or Augmentation(),
            spec=BatchSpec(**{"labelled": 4, "unlabelled_ratio": 2, "iterations": 5} | spec),
            image_size=SIZE,
            seed=seed,
            candidates=likely,
        )

    return make


def batches(data):
    return [batch for batch, _, _ in data.train_dataloader()]


def flat(batch):
    return [*batch["lb"], *batch["ulb"]]


def same(first, second):
    return all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(flat(x), flat(y), strict=True)
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_shapes_and_types(mixed, channels):
    made = batches(mixed(channels=channels))
    assert len(made) == 5
    for batch in made:
        x_lb, y_lb = batch["lb"]
        x_ulb_w, x_ulb_s, i_ulb = batch["ulb"]
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
def test_processes_share_every_batch_out(mixed, processes):
    whole, parts = batches(mixed()), []
    for rank in range(processes):
        data = mixed()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
        parts.append(batches(data))
    for step, batch in enumerate(whole):
        for half in ("lb", "ulb"):
            for i, tensor in enumerate(batch[half]):
                together = torch.stack([part[step][half][i] for part in parts], dim=1).flatten(0, 1)
                assert torch.equal(together, tensor)


def test_labelled_images_that_cannot_be_shared_out_are_refused():
    spec = BatchSpec(labelled=6, unlabelled_ratio=2, iterations=9, workers=1)
    assert spec.shared_by(3) == BatchSpec(labelled=2, unlabelled_ratio=2, iterations=9, workers=1)
    with pytest.raises(ConfigError, match="labelled is 6: 4 processes train, so it must be a multiple of 4"):
        spec.shared_by(4)


def test_batches_are_the_same_again_whatever_the_state_of_the_generators(mixed):
    data = mixed()
    first = batches(data)
    torch.rand(3)
    np.random.default_rng().random(3)
    assert same(first, batches(data))
    assert same(first, batches(mixed()))


def test_a_later_part_of_a_training_follows_from_the_seed_alone(mixed):
    # What a resume needs: draw 30 is the same whether or not 0 to 29 were drawn before.
    whole, late = mixed().unlabelled(), mixed().unlabelled()
    pairs = [whole[draw] for draw in range(31)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(pairs[30], late[30], strict=True))


def test_another_seed_gives_other_batches(mixed):
    first, second = batches(mixed(seed=1)), batches(mixed(seed=2))
    assert not any(same([a], [b]) for a, b in zip(first, second, strict=True))
    positions = [torch.cat([batch["ulb"][2] for batch in made]) for made in (first, second)]
    assert not torch.equal(*positions)


def test_views_of_one_image_differ_from_draw_to_draw(mixed):
    data = mixed(count=12, iterations=4, labels=None)
    views = {}
    for batch in batches(data):
        for weak, position in zip(batch["ulb"][0], batch["ulb"][2].tolist(), strict=True):
            views.setdefault(position, []).append(weak.numpy().tobytes())
    seen_often = [own for own in views.values() if len(own) >= 4]
    assert seen_often
    assert all(len(set(own)) > 1 for own in seen_often)


def test_positions_and_labels_name_the_images(mixed):
    data = mixed(augmentation=STILL)

    def expected(id_):
        return torch.from_numpy(resize(data.source.read([id_])[0], SIZE)).permute(2, 0, 1)

    targets = {expected(id_).numpy().tobytes(): int(label == "anomaly") for id_, label in data.labels.items()}
    for batch in batches(data):
        for weak, strong, position in zip(*batch["ulb"], strict=True):
            assert torch.equal(weak, expected(data.pool[position]))
            assert torch.equal(strong, weak)
        for image, target in zip(*batch["lb"], strict=True):
            assert targets[image.numpy().tobytes()] == target


def test_labelled_images_are_read_once_and_the_pool_when_it_is_drawn(mixed):
    data = mixed(iterations=5)
    batches(data)
    assert data.source.reads == len(data.labels) + 5 * 8


def test_unsure_and_artefact_teach_nothing(mixed, make_source):
    labels = labels_of(make_source(40)) | {"im000021": "unsure", "im000022": "artefact"}
    views = mixed(labels=labels).labelled()
    assert len(views.images) == 8
    assert views.targets.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_candidates_come_more_often_than_others(mixed):
    chosen = ["im000015", "im000021"]
    data = mixed(augmentation=STILL, candidates=2, candidate_share=0.5, likely=chosen)
    own = {data.pool.index(id_) for id_ in chosen}
    for batch in batches(data):
        assert sum(position in own for position in batch["ulb"][2].tolist()) >= 4


def test_an_unreadable_image_of_the_pool_is_replaced_by_the_next(mixed):
    data = mixed(unreadable={"im000015", "im000016"}, augmentation=STILL, iterations=8)
    bad = {data.pool.index(id_) for id_ in ("im000015", "im000016")}
    positions = [p for batch in batches(data) for p in batch["ulb"][2].tolist()]
    assert not bad & set(positions)
    after = data.pool.index("im000017")
    draws = epoch_draws(len(data.pool), 64, np.random.default_rng([0, 1])).tolist()
    assert positions == [after if p in bad else p for p in draws]


def test_an_unreadable_labelled_image_is_left_out(mixed, make_source):
    labels = labels_of(make_source(40))
    views = mixed(labels=labels, unreadable={"im000000", "im000003"}).labelled()
    assert views.targets.tolist() == [1, 0, 0, 0, 0, 0]


def test_nothing_readable_is_a_clear_error(mixed, make_source):
    source = make_source(40)
    labels = labels_of(source)
    pool = [id_ for id_ in source.ids if id_ not in labels]
    with pytest.raises(DataError, match="none of the 32 images of the pool can be read"):
        batches(mixed(unreadable=pool))
    with pytest.raises(LabelError, match="'anomaly'"):
        mixed(unreadable=["im000000", "im000010"]).labelled()


def test_no_pool_and_no_labels(mixed):
    with pytest.raises(DataError, match="no unlabelled images left"):
        mixed(pool=[])
    with pytest.raises(LabelError, match="at least one anomaly and one normal"):
        batches(mixed(labels={"im000001": "normal"}))


def test_the_fixture_is_a_source(make_source):
    assert isinstance(make_source(3), ImageSource)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled": 0}, "algorithm.learner.batch.labelled is 0"),
        ({"unlabelled_ratio": 0}, "algorithm.learner.batch.unlabelled_ratio is 0"),
        ({"iterations": -3}, "algorithm.learner.batch.iterations is -3"),
        ({"candidates": -1}, "algorithm.learner.batch.candidates is -1: it cannot be negative"),
        ({"candidate_share": 1.5}, "candidate_share is 1.5: it is a share, from 0 to 1"),
        ({"candidate_share": math.nan}, "candidate_share is nan"),
        ({"workers": -1}, "algorithm.learner.batch.workers is -1: it cannot be negative"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        BatchSpec(**change)


@pytest.mark.parametrize("change", [{"labelled": 3}, {"unlabelled_ratio": 3}, {"iterations": 2}])
def test_every_number_changes_the_batches(mixed, change):
    shapes = [[tuple(x.shape) for x in flat(batch)] for batch in batches(mixed(**change))]
    assert shapes != [[tuple(x.shape) for x in flat(batch)] for batch in batches(mixed())]


def test_run_folders_from_before_know_the_make_up_of_a_batch_by_its_old_name():
    assert instantiate({"_target_": "anomalymatch.algorithms.fixmatch.batches.BatchSpec", "labelled": 3}) == BatchSpec(
        labelled=3
    )
