import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch.algorithms.msc.loss import (
    angular_term,
    has_direction,
    mean_shifted,
    mean_shifted_contrastive,
    nt_xent,
)


def units(count, width=5, seed=0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows)


CENTRE = units(40, seed=9).mean(0) + 0.1


def slow_shift(row, centre):
    moved = [x - c for x, c in zip(row, centre, strict=True)]
    length = math.sqrt(sum(x * x for x in moved))
    return [x / length for x in moved]


def slow_nt_xent(a, b, temperature):
    views = [*a, *b]
    total = 0.0
    for i, view in enumerate(views):
        partner = (i + len(a)) % len(views)
        powers = {
            j: math.exp(sum(x * y for x, y in zip(view, other, strict=True)) / temperature)
            for j, other in enumerate(views)
            if j != i
        }
        total -= math.log(powers[partner] / sum(powers.values()))
    return total / len(views)


def slow_loss(a, b, centre, temperature):
    shifted = ([slow_shift(row, centre.tolist()) for row in rows.tolist()] for rows in (a, b))
    return slow_nt_xent(*shifted, temperature)


@given(st.integers(2, 9), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_the_loss_is_its_definition(count, temperature, seed):
    a, b = units(count, seed=seed), units(count, seed=seed + 1)
    loss = mean_shifted_contrastive(a, b, CENTRE, temperature)
    assert loss.item() == pytest.approx(slow_loss(a, b, CENTRE, temperature), rel=1e-9)


@given(st.integers(2, 9), st.integers(0, 1000))
def test_with_the_centre_at_zero_it_is_plain_nt_xent(count, seed):
    a, b = units(count, seed=seed), units(count, seed=seed + 1)
    plain = nt_xent(a, b, 0.25)
    assert mean_shifted_contrastive(a, b, torch.zeros(5, dtype=torch.float64), 0.25).item() == pytest.approx(plain)
    assert mean_shifted_contrastive(a, b, CENTRE, 0.25).item() != pytest.approx(plain.item())


def test_mean_shift_by_hand():
    shifted = mean_shifted(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 0.5]))
    expected = [[2 / math.sqrt(5), -1 / math.sqrt(5)], [0.0, 1.0]]
    np.testing.assert_allclose(shifted.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_nt_xent_by_hand():
    """Two images at right angles, each with two equal views, temperature 1/2: similarities are e^2, 1 and 1."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nt_xent(rows, rows, 0.5).item() == pytest.approx(math.log(math.exp(2) + 2) - 2)


def test_angular_term_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # Cosines to the direction (0, 1): 0 and 1, 0.8 and 1; the mean of each view, summed.
    assert angular_term(a, b, torch.tensor([0.0, 0.5])).item() == pytest.approx(-(0.5 + 0.9))


def test_only_the_direction_of_the_centre_counts_for_the_angular_term():
    a, b = units(6), units(6, seed=1)
    assert angular_term(a, b, CENTRE).item() == pytest.approx(angular_term(a, b, 3 * CENTRE).item())
    assert angular_term(a, b, CENTRE).item() == pytest.approx(-angular_term(a, b, -CENTRE).item())


@given(st.permutations(range(7)), st.integers(0, 1000))
def test_the_order_of_the_batch_does_not_matter(order, seed):
    a, b = units(7, seed=seed), units(7, seed=seed + 1)
    for loss in (lambda a, b: mean_shifted_contrastive(a, b, CENTRE, 0.25), lambda a, b: angular_term(a, b, CENTRE)):
        assert loss(a[order], b[order]).item() == pytest.approx(loss(a, b).item(), rel=1e-9)
        assert loss(b, a).item() == pytest.approx(loss(a, b).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_at_the_centre_is_an_error_and_no_nan(dtype):
    rows = units(3, 1280).to(dtype)
    with pytest.raises(ValueError, match="1 of 3 features equal the centre"):
        mean_shifted(rows, rows[1])
    same = rows[:1].repeat(2, 1)
    with pytest.raises(ValueError, match="2 of 2 features equal the centre"):
        mean_shifted(same, same.mean(0))  # rounding of the mean does not hide it
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            mean_shifted(rows * bad, rows[1])
    assert has_direction(torch.cat([rows, rows * torch.nan]), rows[1]).tolist() == [True, False, True, *[False] * 3]


def test_a_single_image_is_an_error():
    with pytest.raises(ValueError, match="expected at least 2 in a batch, got 1"):
        nt_xent(units(1), units(1), 0.25)


def test_a_centre_without_direction_is_an_error():
    with pytest.raises(ValueError, match="the centre of the features is zero"):
        angular_term(units(2), units(2), torch.zeros(5, dtype=torch.float64))
