import math
from functools import partial

import pytest
import torch

from anomalymatch.algorithms.fixmatch.loss import pseudo_labels
from anomalymatch.algorithms.fixmatch.thresholds import UNUSED
from anomalymatch.algorithms.fixmatch.weighting import Alignment, FixedThreshold, FlexMatch, FreeMatch, SoftMatch

MADE = {
    "fixed": partial(FixedThreshold, threshold=0.9),
    "flexmatch": partial(FlexMatch, threshold=0.9),
    "freematch": partial(FreeMatch, threshold=None, momentum=0.9, fairness=0.1),
    "softmatch": partial(SoftMatch, threshold=None, momentum=0.9, n_sigma=2.0),
}


def logits_of(*anomaly):
    """Make logits with these probabilities of the anomaly."""
    p = torch.tensor(anomaly)
    return torch.stack([1 - p, p], dim=1).log()


def random_logits(seed, count=12):
    return 3 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MADE)
def test_a_weighting_gives_targets_and_weights_and_no_gradient(name):
    weighting, logits = MADE[name](pool=12), random_logits(0).requires_grad_()
    for _ in range(3):
        targets, mask = weighting(logits, torch.arange(12))
    assert torch.equal(targets, logits.argmax(1))
    assert mask.shape == (12,)
    assert ((mask >= 0) & (mask.float() <= 1)).all()
    assert not mask.requires_grad
    assert all(not buffer.requires_grad for buffer in weighting.buffers())


def test_the_fixed_threshold_is_that_of_fixmatch():
    logits = random_logits(1)
    pseudo, plain = MADE["fixed"](pool=0)(logits, torch.arange(12)), pseudo_labels(logits, 0.9)
    assert torch.equal(pseudo.targets, plain.targets)
    assert torch.equal(pseudo.mask, plain.mask)
    assert 0 < pseudo.mask.sum() < 12
    assert FixedThreshold(0, None)(logits, torch.arange(12)).mask.all()


def test_flexmatch_remembers_the_last_confident_label_of_each_image():
    weighting = FlexMatch(6, 0.9)
    first = weighting(logits_of(0.01, 0.02, 0.6), torch.tensor([5, 0, 3]))
    assert first.mask.all()  # of nothing known, all thresholds are 0
    assert weighting.state_to_log == {"threshold_normal": 0.0, "threshold_anomaly": 0.0}
    assert weighting.labels.tolist() == [0, UNUSED, UNUSED, UNUSED, UNUSED, 0]
    # beta = 2 / 4 unused for the normals, and M(1/2) = 1/3; nothing for the anomalies.
    second = weighting(logits_of(0.95, 0.4, 0.55), torch.tensor([0, 1, 2]))
    assert {k: v.item() for k, v in weighting.state_to_log.items()} == pytest.approx(
        {"threshold_normal": 0.3, "threshold_anomaly": 0.0}
    )
    assert second.mask.all()
    assert weighting.labels.tolist() == [1, UNUSED, UNUSED, UNUSED, UNUSED, 0]  # changed its mind of image 0


def test_flexmatch_lowers_the_threshold_of_the_rare_class():
    weighting, positions = FlexMatch(10, 0.9), torch.arange(10)
    logits = logits_of(*[0.05] * 8, 0.95, 0.95)
    weighting(logits, positions)
    pseudo = weighting(logits_of(*[0.2] * 8, 0.8, 0.8), positions)  # not sure of any
    # beta = 2/8 for the anomalies: their threshold is 0.9/7.
    assert weighting.state_to_log["threshold_anomaly"].item() == pytest.approx(0.9 / 7)
    assert pseudo.mask.tolist() == [False] * 8 + [True, True]


def test_an_image_twice_in_a_batch_gets_one_label_in_any_order():
    labels = []
    for order in ([0, 1], [1, 0]):
        weighting = FlexMatch(2, 0.9)
        weighting(logits_of(0.01, 0.99)[order], torch.tensor([1, 1]))
        labels.append(weighting.labels.tolist())
    assert labels[0] == labels[1]


def test_freematch_follows_the_confidence_by_hand():
    weighting = FreeMatch(0, None, momentum=0.75, fairness=0.1)
    pseudo = weighting(logits_of(0.1, 0.2, 0.7), torch.arange(3))
    # Confidences 0.9, 0.8, 0.7; mean probability of the anomaly 1/3; a third predicted to be one.
    confidence, anomaly = 0.75 * 0.5 + 0.25 * 0.8, 0.75 * 0.5 + 0.25 / 3
    assert weighting.confidence.item() == pytest.approx(confidence)
    assert weighting.means.tolist() == pytest.approx([1 - anomaly, anomaly])
    assert weighting.histogram.tolist() == pytest.approx([1 - anomaly, anomaly])
    assert weighting.state_to_log["threshold_normal"].item() == pytest.approx(confidence)
    assert weighting.state_to_log["threshold_anomaly"].item() == pytest.approx(confidence * anomaly / (1 - anomaly))
    assert pseudo.mask.all()
    assert weighting(logits_of(0.45), torch.arange(1)).mask.tolist() == [False]


def test_the_fairness_term_is_of_the_strong_views_that_pass():
    weighting = FreeMatch(0, None, momentum=0.5, fairness=0.1)
    pseudo = weighting(logits_of(0.1, 0.2, 0.9, 0.4), torch.arange(4))
    assert pseudo.mask.tolist() == [True, True, True, False]
    strong = logits_of(0.3, 0.2, 0.6, 0.9).requires_grad_()
    term = weighting.penalty(strong, pseudo)
    expected = [m / h for m, h in zip(weighting.means.tolist(), weighting.histogram.tolist(), strict=True)]
    batch = [(0.7 + 0.8 + 0.4) / 2, (0.3 + 0.2 + 0.6) / 1]
    slow = sum(e / sum(expected) * math.log(b / sum(batch)) for e, b in zip(expected, batch, strict=True))
    assert term.item() == pytest.approx(0.1 * slow, rel=1e-5)
    term.backward()
    assert strong.grad[:3].abs().min() > 0
    assert not strong.grad[3].any()


def test_softmatch_weights_by_hand():
    weighting = SoftMatch(0, None, momentum=0.5, n_sigma=2.0)
    weighting.uniform = torch.nn.Identity()  # the Gaussian alone
    pseudo = weighting(logits_of(0.1, 0.3, 0.8), torch.arange(3))
    confidences = torch.tensor([0.9, 0.7, 0.8])
    mean, variance = 0.5 * 0.5 + 0.5 * 0.8, 0.5 * 1 + 0.5 * 0.01
    assert {k: v.item() for k, v in weighting.state_to_log.items()} == pytest.approx(
        {"confidence_mean": mean, "confidence_deviation": math.sqrt(variance)}
    )
    assert pseudo.mask.tolist() == pytest.approx([1.0] * 3)
    lower = weighting(logits_of(0.45, 0.45), torch.arange(2)).mask
    mean, variance = 0.5 * mean + 0.5 * 0.55, 0.5 * variance
    assert lower.tolist() == pytest.approx([math.exp(-4 * (mean - 0.55) ** 2 / (2 * variance))] * 2, rel=1e-4)
    assert confidences.var().item() == pytest.approx(0.01)  # the unbiased one


def test_uniform_alignment_weights_the_rare_class_more_and_leaves_the_labels():
    logits = logits_of(*[0.05] * 10, 0.4, 0.7)
    aligned, plain = (SoftMatch(0, None, momentum=0.0, n_sigma=2.0) for _ in range(2))
    plain.uniform = torch.nn.Identity()
    first, second = (weighting(logits, torch.arange(12)) for weighting in (aligned, plain))
    assert torch.equal(first.targets, second.targets)
    assert first.targets.tolist() == [0] * 11 + [1]
    assert first.mask[11] > second.mask[11]


def test_softmatch_takes_a_single_image():
    assert SoftMatch(0, None, momentum=0.9, n_sigma=2.0)(logits_of(0.2), torch.arange(1)).mask.isfinite().all()


def test_alignment_moves_towards_the_prior():
    alignment = Alignment(prior=0.05, momentum=0.9)
    logits = random_logits(3, 400)
    assert logits.softmax(1)[:, 1].mean() > 0.4
    for _ in range(3):
        aligned = alignment(logits)
    anomaly = logits.softmax(1)[:, 1]
    scaled = anomaly * 0.05 / anomaly.mean(), (1 - anomaly) * 0.95 / (1 - anomaly).mean()
    torch.testing.assert_close(aligned.softmax(1)[:, 1], scaled[0] / (scaled[0] + scaled[1]))
    assert aligned.softmax(1)[:, 1].mean() < 0.3
    assert not aligned.requires_grad


def test_the_mean_prediction_is_weighted():
    alignment, even = Alignment(prior=0.05, momentum=0.9), Alignment(prior=0.05, momentum=0.9)
    alignment(logits_of(0.9, 0.8, 0.1), torch.tensor([0.5, 0.5, 3.0]))
    assert alignment.means[1].item() == pytest.approx((0.5 * 0.9 + 0.5 * 0.8 + 3 * 0.1) / 4)
    alike = even(logits_of(0.9, 0.8, 0.1), torch.full((3,), 7.0))
    torch.testing.assert_close(alike, Alignment(prior=0.05, momentum=0.9)(logits_of(0.9, 0.8, 0.1)))


def test_the_mean_prediction_is_a_plain_mean_at_first():
    alignment = Alignment(prior=0.01, momentum=0.75)
    seen = [0.1, 0.5, 0.3, 0.1, 0.9]
    for anomaly in seen[:4]:
        alignment(logits_of(anomaly, anomaly))
    assert alignment.means[1].item() == pytest.approx(sum(seen[:4]) / 4)
    alignment(logits_of(seen[4]))
    assert alignment.means[1].item() == pytest.approx(0.75 * sum(seen[:4]) / 4 + 0.25 * seen[4])


def test_without_a_prior_logits_are_returned_unchanged():
    logits = random_logits(0)
    alignment = Alignment(prior=None, momentum=0.9)
    assert alignment(logits) is logits
    assert not alignment.state_dict()
