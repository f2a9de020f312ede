import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalymatch.clustering import distances as clustering
from anomalymatch.clustering.distances import (
    normal_scores,
    patch_projection,
    patch_weights,
    relative_scores,
    unsupervised_scores,
    weighted_means,
)


def bags(n, p, d=5, seed=0):
    return torch.randn(n, p, d, generator=torch.Generator().manual_seed(seed))


def nearest(z, image):
    return min(math.dist(z, w) for w in image)


def unsupervised_twin(patches, references, lowest):
    """The definition, patch by patch."""
    scores = []
    for i, image in enumerate(patches.tolist()):
        others = [patches[j].tolist() for j in references.tolist() if j != i]
        kept = max(1, round(lowest * len(others)))
        scores.append([sum(sorted(nearest(z, other) for other in others)[:kept]) / kept for z in image])
    return torch.tensor(scores)


def normal_twin(patches, normals, own):
    scores = []
    for image, mine in zip(patches.tolist(), own.tolist(), strict=True):
        others = [other for j, other in enumerate(normals.tolist()) if j != mine]
        scores.append([min(nearest(z, other) for other in others) for z in image])
    return torch.tensor(scores)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.data(), st.floats(0.01, 1.0), st.integers(0, 50))
def test_unsupervised_scores_equal_the_slow_twin(n, p, data, lowest, seed):
    patches = bags(n, p, seed=seed)
    references = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=2, unique=True)))
    fast, slow = (score(patches, references, lowest) for score in (unsupervised_scores, unsupervised_twin))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-3)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(2, 5), st.integers(1, 4), st.integers(0, 50))
def test_normal_scores_equal_the_slow_twin(n, p, m, q, seed):
    patches, normals = bags(n, p, seed=seed), bags(m, q, seed=seed + 1)
    own = torch.randint(-1, m, (n,), generator=torch.Generator().manual_seed(seed))
    fast, slow = (score(patches, normals, own) for score in (normal_scores, normal_twin))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-3)


def test_scores_by_hand():
    patches = torch.tensor([[[0.0], [1.0]], [[3.0], [5.0]], [[10.0], [0.0]]])
    everything = torch.arange(3)
    # To image 1 patch 0 has the distance 3, to image 2 it has 0.
    expected = torch.tensor([[(3 + 0) / 2, (2 + 1) / 2], [(2 + 3) / 2, (4 + 5) / 2], [(9 + 5) / 2, (0 + 3) / 2]])
    torch.testing.assert_close(unsupervised_scores(patches, everything, 1.0), expected)
    smallest = torch.tensor([[0.0, 1.0], [2.0, 4.0], [5.0, 0.0]])
    torch.testing.assert_close(unsupervised_scores(patches, everything, 0.5), smallest)  # of two distances one
    torch.testing.assert_close(normal_scores(patches, patches, everything), smallest)
    # Images 2 and 0 are compared with each other alone.
    scores = unsupervised_scores(patches, torch.tensor([2, 0]), 1.0)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0], [(2 + 3) / 2, (4 + 5) / 2], [9.0, 0.0]]))


def scores_of_all(patches):
    return unsupervised_scores(patches, torch.arange(len(patches)), 0.3)


def scores_of_some(patches):
    return unsupervised_scores(patches, torch.arange(0, len(patches), 2), 0.6)


def scores_of_normals(patches):
    return normal_scores(patches, patches, torch.arange(len(patches)))


ALL_SCORES = pytest.mark.parametrize("score", [scores_of_all, scores_of_some, scores_of_normals])


@ALL_SCORES
@pytest.mark.parametrize("elements", [1, 100, 700])
def test_block_size_does_not_matter(monkeypatch, score, elements):
    patches = bags(11, 6)
    expected = score(patches)
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(clustering, "QUERY_IMAGES", 3)
    torch.testing.assert_close(score(patches), expected)


@pytest.mark.parametrize("score", [scores_of_all, scores_of_normals])
def test_order_of_patches_and_images_does_not_matter(score):
    patches = bags(7, 6)
    scores = score(patches)
    images, places = torch.randperm(7), torch.randperm(6)
    torch.testing.assert_close(score(patches[images]), scores[images])
    torch.testing.assert_close(score(patches[:, places]), scores[:, places])
    weights = patch_weights(scores, 0.3)
    torch.testing.assert_close(weighted_means(patches[:, places], weights[:, places]), weighted_means(patches, weights))


def test_two_images_and_duplicates():
    patches = bags(2, 4)
    both = torch.arange(2)
    for lowest in (0.01, 1.0):  # the other image is the only one
        scores = unsupervised_scores(patches, both, lowest)
        torch.testing.assert_close(scores, torch.cdist(patches, patches.flip(0)).amin(2), rtol=1e-4, atol=1e-3)
    twice = torch.cat([patches, patches])  # each image has an exact copy, at the distance 0, and two others
    alone, copied = unsupervised_scores(patches, both, 1.0), unsupervised_scores(twice, torch.arange(4), 1.0)
    torch.testing.assert_close(copied[:2], 2 / 3 * alone, rtol=1e-4, atol=2e-3)
    assert unsupervised_scores(twice, torch.arange(4), 0.3).amax() < 5e-3


@ALL_SCORES
def test_half_precision_is_widened(score):
    patches = bags(5, 4).half()
    torch.testing.assert_close(score(patches), score(patches.float()))


def test_scores_need_another_image_and_a_share():
    with pytest.raises(ValueError, match="no other image"):
        normal_scores(bags(1, 3), bags(1, 3), torch.tensor([0]))
    assert normal_scores(bags(1, 3), bags(1, 3, seed=1), torch.tensor([-1])).shape == (1, 3)
    for images, references in ((1, [0]), (2, [1]), (2, [])):
        with pytest.raises(ValueError, match="no other image"):
            unsupervised_scores(bags(images, 3), torch.tensor(references, dtype=torch.int64), 1.0)
    for lowest in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 < lowest"):
            unsupervised_scores(bags(3, 3), torch.arange(3), lowest)


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(1, 8), st.integers(0, 20))
def test_weights_sum_to_one_and_follow_the_scores(tau, p, seed):
    scores = bags(4, p, 1, seed=seed)[..., 0].abs()
    weights = patch_weights(scores, tau)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert bool((weights >= 0).all())
    assert torch.equal(weights.argmax(1)[weights.amax(1) > 1.001 / p], scores.argmax(1)[weights.amax(1) > 1.001 / p])


def test_weights_by_hand_and_in_the_limits():
    scores = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])
    torch.testing.assert_close(patch_weights(scores, 1.0), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    torch.testing.assert_close(patch_weights(scores, 0.5), torch.tensor([[0.1, 0.9], [0.5, 0.5]]))
    alone = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert torch.equal(patch_weights(scores, 0.0), alone)
    torch.testing.assert_close(patch_weights(scores, 1e-300), alone)
    same = torch.full((2, 2), 0.5)
    assert torch.equal(patch_weights(scores, math.inf), same)
    torch.testing.assert_close(patch_weights(scores, 1e12), same)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="expected tau >= 0"):
            patch_weights(scores, wrong)


def test_relative_scores_have_no_unit():
    scores = bags(3, 4, 1)[..., 0].abs()
    torch.testing.assert_close(relative_scores(scores * 1000.0), relative_scores(scores))
    assert relative_scores(scores).mean().item() == pytest.approx(1.0)
    assert torch.equal(relative_scores(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_means_by_hand():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 2.0], [4.0, 0.0]]])
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    torch.testing.assert_close(weighted_means(patches, weights), torch.tensor([[0.25, 0.75], [2.0, 2.0]]))


def test_projection_keeps_distances_or_equalises_variances():
    patches = bags(1, 200, 6)[0] * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
    mean, whole = patch_projection(patches, 6, 0.0)
    torch.testing.assert_close(torch.pdist((patches - mean) @ whole), torch.pdist(patches), rtol=1e-4, atol=1e-4)
    mean, white = patch_projection(patches, 6, 1.0)
    spread = ((patches - mean) @ white).std(0, correction=0)
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), rtol=1e-3, atol=1e-3)
    mean, half = patch_projection(patches, 2, 0.5)
    assert half.shape == (6, 2)
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0)).flip(0)
    torch.testing.assert_close(((patches - mean) @ half).var(0, correction=0), values[:2].sqrt(), rtol=1e-3, atol=1e-3)
    mean, nothing = patch_projection(torch.ones(5, 3), 3, 0.5)
    assert bool((nothing == 0.0).all())
    for components, whitening in ((0, 0.5), (2, -0.1), (2, 1.1)):
        with pytest.raises(ValueError, match="expected components"):
            patch_projection(patches, components, whitening)
