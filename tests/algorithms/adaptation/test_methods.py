"""Losses against slow twins, and what each method does with the views of a batch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hydra.utils import instantiate
from torch import nn

from anomalymatch.algorithms.adaptation.methods import Teacher, rising
from anomalymatch.algorithms.msc.loss import nt_xent
from anomalymatch.config import compose

METHODS = ("simclr", "vicreg", "byol", "dino")


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone[1].eval()


def make(name, backbone, **changes):
    torch.manual_seed(0)
    node = compose(f"adapt={name}", name="adapt").adapt.method
    small = {"hidden": 12, "projection": 8} | ({"prototypes": 10} if name == "dino" else {})
    return instantiate(node)(backbone, **small | changes).eval()  # without batch statistics, rows are independent


def views(count=6, seed=0):
    return torch.randint(0, 256, (2 * count, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).byte()


def test_simclr_is_the_cross_entropy_of_the_paper(backbone):
    method = make("simclr", backbone, temperature=0.3)
    a, b = F.normalize(method.head(backbone(views())), dim=1).chunk(2)
    torch.testing.assert_close(method(backbone, views()), nt_xent(a, b, 0.3))


def test_vicreg_is_the_loss_of_the_paper(backbone):
    method = make("vicreg", backbone, invariance=3.0, variance=2.0, covariance=0.5)
    a, b = method.head(backbone(views())).chunk(2)
    expected = 3.0 * (a - b).square().mean()
    for z in (a, b):
        deviation = (z.var(dim=0) + 1e-4).sqrt()
        expected += 2.0 * 0.5 * (1 - deviation).clamp(min=0).mean()
        covariance = torch.cov(z.T)
        expected += 0.5 * (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    torch.testing.assert_close(method(backbone, views()), expected)


def test_byol_predicts_the_teachers_projection_of_the_other_view(backbone):
    method = make("byol", backbone)
    a, b = method.prediction(method.head(backbone(views()))).chunk(2)
    target_a, target_b = method.head(backbone(views())).chunk(2)  # the teacher starts as a copy
    expected = -(F.cosine_similarity(a, target_b).mean() + F.cosine_similarity(b, target_a).mean()) / 2
    torch.testing.assert_close(method(backbone, views()), expected)


def test_dino_is_the_cross_entropy_with_the_teachers_other_view(backbone):
    method = make("dino", backbone)
    outputs = method.head(backbone(views()))
    student = F.log_softmax(outputs / 0.1, dim=1).chunk(2)
    teacher = F.softmax(outputs / 0.04, dim=1).chunk(2)
    expected = -sum((t * s).sum(1).mean() for t, s in zip(teacher, student[::-1], strict=True)) / 2
    torch.testing.assert_close(method(backbone, views()), expected)
    torch.testing.assert_close(method.loss.center.flatten(), 0.1 * outputs.mean(0))  # momentum 0.9, from zero


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_the_backbone_and_its_heads_but_not_the_teacher(backbone, name):
    method = make(name, backbone)
    method(backbone, views()).backward()
    assert sum(p.grad.abs().sum().item() for p in backbone.parameters() if p.grad is not None) > 0
    learning = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning)
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    assert len(teachers) == (name in ("byol", "dino"))
    assert all(p.grad is None and not p.requires_grad for teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_views_and_images_does_not_matter(backbone, name):
    given = views()
    a, b = given.chunk(2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    same = (given, torch.cat([b, a]), torch.cat([a[order], b[order]]))
    pairs_alone = {"variance": 0.0, "covariance": 0.0} if name == "vicreg" else {}

    def loss(x):
        return make(name, backbone, **pairs_alone)(backbone, x).item()  # made again: the centre of DINO moves

    assert [loss(x) for x in same] == pytest.approx([loss(given)] * 3, rel=1e-4, abs=1e-7)
    assert loss(torch.cat([a, b[order]])) != pytest.approx(loss(given), rel=1e-5, abs=1e-7)  # pairs of other images


def test_a_teacher_follows_by_its_momentum(backbone):
    head = nn.Linear(backbone.width, 3)
    teacher = Teacher(backbone, head, nn.Linear(backbone.width, 3))
    before = teacher.head.weight.clone()
    assert torch.equal(before, head.weight)
    moved = copy.deepcopy(backbone)
    with torch.no_grad():
        head.weight.add_(1.0)
        next(moved.parameters()).add_(1.0)
    start = next(teacher.backbone.parameters()).clone()
    teacher.follow(moved, head, 0.75)
    torch.testing.assert_close(teacher.head.weight, before + 0.25)
    torch.testing.assert_close(next(teacher.backbone.parameters()), start + 0.25)


def test_the_momentum_rises_to_one_along_half_a_cosine():
    assert rising(0.9, 0.0) == pytest.approx(0.9)
    assert rising(0.9, 0.5) == pytest.approx(0.95)
    assert rising(0.9, 1.0) == 1.0
    assert rising(0.98, 0.25) == pytest.approx(1 - 0.02 * (1 + math.cos(math.pi / 4)) / 2)
