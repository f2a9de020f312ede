import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from anomalymatch.algorithms.augmentation.pairs import TwoViewBatches
from anomalymatch.algorithms.augmentation.two_views import TwoViewAugmentation
from anomalymatch.config import compose
from anomalymatch.errors import DataError

PLAIN = OmegaConf.to_container(compose("algorithm=msc").algorithm.learner.two_views)
del PLAIN["_target_"]
STILL = PLAIN | {"crop": [1.0, 1.0], "jitter_probability": 0.0, "grey": 0.0, "blur": 0.0, "flip": 0.0}


def batches(source, ids=None, **changes):
    values = {"image_size": 16, "batch_size": 8, "epochs": 2, "workers": 0, "seed": 0}
    values |= changes
    view = TwoViewAugmentation(**values.pop("augmentation", PLAIN)).view(source.channels, values["image_size"])
    return TwoViewBatches(source, source.ids if ids is None else ids, view=view, **values)


def image(channels=3, size=16):
    return np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)


def test_a_batch_is_two_views_of_the_same_images(make_source):
    source = make_source(20, size=16)
    batch = next(iter(batches(source, augmentation=STILL).train_dataloader()))
    assert [views.shape for views in batch] == [(8, 3, 16, 16)] * 2
    assert all(views.dtype == torch.uint8 for views in batch)
    originals = {read.tobytes() for read in source.read(source.ids)}
    for a, b in zip(*batch, strict=True):  # nothing moves in these views
        assert torch.equal(a, b)
        assert a.permute(1, 2, 0).contiguous().numpy().tobytes() in originals
    first, second = next(iter(batches(source).train_dataloader()))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_epoch_has_every_image_once_without_the_last_batch(make_source):
    data = batches(make_source(20, size=16), epochs=3)
    draws = data.views().draws.reshape(3, -1)
    assert (data.steps, draws.shape) == (2, (3, 16))
    assert all(len(set(epoch.tolist())) == 16 for epoch in draws)
    assert len({tuple(epoch.tolist()) for epoch in draws}) == 3
    assert len(list(data.train_dataloader())) == 6
    few = batches(make_source(5, size=16))
    assert (few.batch_size, few.steps) == (5, 1)


def test_views_follow_from_the_seed_and_not_from_the_workers(make_source):
    source = make_source(20, size=16)
    alone, helped, other = (
        torch.cat([torch.cat(batch) for batch in batches(source, **words).train_dataloader()])
        for words in ({}, {"workers": 1}, {"seed": 1})
    )
    assert torch.equal(alone, helped)
    assert not torch.equal(alone, other)


def test_an_image_that_cannot_be_read_is_replaced_by_the_next(make_source):
    source = make_source(6, size=16, unreadable={"im000002"})
    data = batches(source, augmentation=STILL, epochs=1)
    draws, views = data.views().draws.tolist(), data.views()
    assert torch.equal(views[draws.index(2)][0], views[draws.index(3)][0])
    with pytest.raises(DataError, match="none of 1 images can be read: 1 "):
        batches(source, ids=["im000002"]).views()[0]
    with pytest.raises(DataError, match="there are no images to learn from"):
        batches(source, ids=[])


KNOBS = {
    "crop": [0.2, 0.3],
    "jitter": [0.4, 0.4, 0.4, 0.5],
    "jitter_probability": 1.0,
    "grey": 1.0,
    "blur": 1.0,
    "blur_sigma": [3.0, 3.0],
    "flip": 1.0,
    "vertical_flip": 1.0,
}


def test_every_knob_is_turned():
    assert set(KNOBS) == set(PLAIN)


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_changes_the_views(knob):
    base = STILL | {"jitter": {"jitter_probability": 1.0}, "blur_sigma": {"blur": 1.0}}.get(knob, {})
    plain, changed = (TwoViewAugmentation(**values).view(3, 16) for values in (base, base | {knob: KNOBS[knob]}))
    assert any(not np.array_equal(plain(image(), seed), changed(image(), seed)) for seed in range(5))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_bands(channels):
    view = TwoViewAugmentation(**PLAIN | {"blur": 1.0, "jitter_probability": 1.0}).view(channels, 16)
    shown = [view(image(channels), seed) for seed in range(20)]
    assert {(s.shape, s.dtype) for s in shown} == {((16, 16, channels), np.dtype(np.uint8))}
    assert len({s.tobytes() for s in shown}) == 20


def test_a_crop_keeps_the_share_that_it_should():
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    view = TwoViewAugmentation(**STILL | {"crop": [0.25, 0.25]}).view(3, 64)
    widths = [np.ptp(view(ramp, seed)) / np.ptp(ramp) for seed in range(40)]
    assert np.mean(widths) == pytest.approx(0.5, abs=0.08)  # the root of the area, whatever the aspect
