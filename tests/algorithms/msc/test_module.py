import copy
from functools import partial

import pytest
import torch
from torch import nn

from anomalymatch.algorithms.augmentation.pairs import ViewPair
from anomalymatch.algorithms.layer_groups import freeze_lower_groups
from anomalymatch.algorithms.msc.loss import angular_term, mean_shifted_contrastive, nt_xent
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive, MscSpec
from anomalymatch.errors import DataError

STEPS = 3


def spec(**changes):
    values = {"temperature": 0.25, "mean_shift": True, "angular_weight": 0.0, "weight_decay": 0.0}
    return MscSpec(**values | changes)


@pytest.fixture
def pair():
    def make(seed=0, count=6):
        generator = torch.Generator().manual_seed(seed)
        views = (torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2))
        return ViewPair(*views)

    return make


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone[1].eval()


@pytest.fixture
def centre(backbone, pair):
    return features(backbone, torch.cat([torch.cat(pair(seed)) for seed in range(3)])).mean(0).detach()


def features(backbone, images):
    return nn.functional.normalize(backbone(images), dim=1)


def module_of(backbone, centre, *, lr=0.1, **changes):
    return MeanShiftedContrastive(
        copy.deepcopy(backbone), centre, spec(**changes), optimizer=partial(torch.optim.SGD, lr=lr)
    )


def loss_of(module, batch):
    logged = {}
    module.log_dict = lambda row: logged.update({k: v.item() for k, v in row.items()})
    return module.training_step(batch, 0), logged


@pytest.mark.parametrize(("shift", "weight"), [(True, 0.0), (True, 2.0), (False, 0.0), (False, 2.0)])
def test_the_loss_of_a_step_is_its_definition(backbone, centre, pair, shift, weight):
    a, b = (features(backbone, views) for views in pair())
    contrast = mean_shifted_contrastive(a, b, centre, 0.25) if shift else nt_xent(a, b, 0.25)
    angle = angular_term(a, b, centre)
    loss, logged = loss_of(module_of(backbone, centre, mean_shift=shift, angular_weight=weight), pair())
    assert loss.item() == pytest.approx((contrast + weight * angle).item(), rel=1e-3)
    assert logged == pytest.approx(
        {"loss": loss.item(), "loss_contrast": contrast.item(), "loss_angular": angle.item()}, rel=1e-3
    )


def test_collapsed_features_raise(backbone, pair):
    same = ViewPair(*[pair()[0][:1].repeat(4, 1, 1, 1)] * 2)
    centre = features(backbone, same[0])[0].detach()
    with pytest.raises(DataError, match="expected at least 2 in a batch, got 0"):
        loss_of(module_of(backbone, centre), same)
    broken = module_of(backbone, centre)
    next(broken.backbone.parameters()).data.fill_(torch.nan)
    with pytest.raises(DataError, match="some features are not finite, lower the learning rate"):
        loss_of(broken, same)


def test_a_pair_without_direction_is_left_out_and_leaves_the_gradient_finite(backbone, centre, pair):
    class Blind(nn.Module):
        """Backbone with zero features for black images, as with ReLUs."""

        def __init__(self):
            super().__init__()
            self.backbone = copy.deepcopy(backbone)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return self.scale * self.backbone(images) * (images.flatten(1).amax(1) > 0)[:, None]

    module = module_of(backbone, centre, mean_shift=False)
    module.backbone = Blind()
    a, b = pair()
    a[2] = 0
    loss, _ = loss_of(module, ViewPair(a, b))
    kept = [0, 1, 3, 4, 5]
    expected, _ = loss_of(module_of(backbone, centre, mean_shift=False), ViewPair(a[kept], b[kept]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.backbone.parameters() if p.grad is not None)


def test_lightning_trains_it_as_the_plain_loop_does_with_batch_norms_at_rest(
    backbone, centre, pair, train_with_lightning
):
    freeze_lower_groups(backbone.body, 2)
    trained = module_of(backbone.train(), centre, weight_decay=0.01)
    modes = train_with_lightning(trained, [pair(step) for step in range(STEPS)], trained.backbone)
    assert modes == {(True, False)}

    plain = module_of(backbone.train(), centre, weight_decay=0.01)
    plain.on_train_start()
    optimizer = plain.configure_optimizers()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(plain, pair(step))[0].backward()
        optimizer.step()
    before, after = backbone.state_dict(), trained.backbone.state_dict()
    for name, value in plain.backbone.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert frozen
    assert changed
    assert not changed & frozen
    assert not any("running" in name for name in changed)
