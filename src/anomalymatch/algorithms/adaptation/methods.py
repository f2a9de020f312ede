"""Methods of self-supervised learning on two views of each image: heads, losses and, if there is one, the teacher."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anomalymatch.backbones.network import Backbone
from anomalymatch.checks import check_range
from anomalymatch.errors import ConfigError

try:
    from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
    from lightly.models.modules.heads import (
        BYOLPredictionHead,
        BYOLProjectionHead,
        DINOProjectionHead,
        SimCLRProjectionHead,
        VICRegProjectionHead,
    )
except ImportError as error:
    raise ConfigError(f"adapt needs: pip install 'anomalymatch[adapt]' ({error})") from error

KEY = "adapt.method"
Features = Float[Tensor, "b d"]


class Method(nn.Module):
    """Heads and loss of a method; its parameters with `requires_grad` learn beside the backbone's."""

    def forward(self, backbone: Backbone, views: Tensor) -> Float[Tensor, ""]:
        """Compute the loss of a batch: the first views of all images, followed by the second ones."""
        raise NotImplementedError

    def follow(self, backbone: Backbone, done: float) -> None:
        """Move the teacher towards the network, before each step; `done` is the share of the training that is done."""


class SimCLR(Method):
    """Each view has to recognise the other view of its image among all views of a batch (arXiv 2002.05709).

    Args:
        backbone: gives the width of the features.
        hidden: width of the hidden layer of the projection.
        projection: width of the projection.
        temperature: of the softmax over similarities; a lower one weights similar images more.
    """

    def __init__(self, backbone: Backbone, *, hidden: int, projection: int, temperature: float) -> None:
        super().__init__()
        _check_widths(hidden=hidden, projection=projection)
        check_range(f"{KEY}.temperature", temperature, above=0)
        self.head = SimCLRProjectionHead(backbone.width, hidden, projection)
        self.loss = NTXentLoss(temperature)

    def forward(self, backbone: Backbone, views: Tensor) -> Float[Tensor, ""]:
        """See `Method`."""
        return self.loss(*self.head(backbone(views).float()).chunk(2))


class VICReg(Method):
    """Equal projections of both views, with variance in every dimension and none in common (arXiv 2105.04906).

    Args:
        backbone: gives the width of the features.
        hidden: width of the hidden layers of the projection.
        projection: width of the projection.
        invariance, variance, covariance: weights of the three terms.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: int,
        projection: int,
        invariance: float,
        variance: float,
        covariance: float,
    ) -> None:
        super().__init__()
        _check_widths(hidden=hidden, projection=projection)
        for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
            check_range(f"{KEY}.{name}", weight, low=0)
        self.head = VICRegProjectionHead(backbone.width, hidden, projection)
        self.loss = VICRegLoss(invariance, variance, covariance)

    def forward(self, backbone: Backbone, views: Tensor) -> Float[Tensor, ""]:
        """See `Method`."""
        return self.loss(*self.head(backbone(views).float()).chunk(2))


class Teacher(nn.Module):
    """Moving average of the backbone and the projection, which makes the targets of the student.

    Args:
        backbone: the student's.
        student: projection of the student.
        head: another projection of the same architecture, which becomes the teacher's.
    """

    def __init__(self, backbone: Backbone, student: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        head.load_state_dict(student.state_dict())
        self.head = head
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Features:
        """Project views."""
        return self.head(self.backbone(views).float())

    @torch.no_grad()
    def follow(self, backbone: Backbone, student: nn.Module, momentum: float) -> None:
        """Move by 1 - momentum towards the student; frozen parameters stay equal to the last bit."""
        for own, other in ((self.backbone, backbone), (self.head, student)):
            for average, value in zip(own.parameters(), other.parameters(), strict=True):
                if value.requires_grad:
                    average.lerp_(value, 1.0 - momentum)


class BYOL(Method):
    """The student predicts the teacher's projection of the other view; no image is a negative (arXiv 2006.07733).

    Args:
        backbone: the student.
        hidden: width of the hidden layers.
        projection: width of the projection.
        momentum: of the teacher at the start; it rises to 1 along half a cosine.
    """

    def __init__(self, backbone: Backbone, *, hidden: int, projection: int, momentum: float) -> None:
        super().__init__()
        _check_widths(hidden=hidden, projection=projection)
        check_range(f"{KEY}.momentum", momentum, low=0, high=1)
        self.momentum = momentum
        self.head = BYOLProjectionHead(backbone.width, hidden, projection)
        self.prediction = BYOLPredictionHead(projection, hidden, projection)
        self.teacher = Teacher(backbone, self.head, BYOLProjectionHead(backbone.width, hidden, projection))
        self.loss = NegativeCosineSimilarity()

    def forward(self, backbone: Backbone, views: Tensor) -> Float[Tensor, ""]:
        """See `Method`."""
        a, b = self.prediction(self.head(backbone(views).float())).chunk(2)
        target_a, target_b = self.teacher(views).chunk(2)
        return (self.loss(a, target_b) + self.loss(b, target_a)) / 2

    def follow(self, backbone: Backbone, done: float) -> None:
        """See `Method`."""
        self.teacher.follow(backbone, self.head, rising(self.momentum, done))


class DINO(Method):
    """The student's distribution over prototypes follows the teacher's of the other view (arXiv 2104.14294).

    Args:
        backbone: the student.
        hidden: width of the hidden layers.
        projection: width of the projection.
        prototypes: number of prototypes.
        momentum: of the teacher at the start; it rises to 1 along half a cosine.
        student_temperature, teacher_temperature: of both softmaxes; the teacher's is lower, which sharpens.
        centre_momentum: of the mean of the teacher's outputs, which is subtracted against collapse.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden: int,
        projection: int,
        prototypes: int,
        momentum: float,
        student_temperature: float,
        teacher_temperature: float,
        centre_momentum: float,
    ) -> None:
        super().__init__()
        _check_widths(hidden=hidden, projection=projection, prototypes=prototypes)
        check_range(f"{KEY}.momentum", momentum, low=0, high=1)
        check_range(f"{KEY}.centre_momentum", centre_momentum, low=0, below=1)
        check_range(f"{KEY}.student_temperature", student_temperature, above=0)
        check_range(f"{KEY}.teacher_temperature", teacher_temperature, above=0)
        self.momentum = momentum
        with _old_weight_norm():
            self.head, head = (
                DINOProjectionHead(backbone.width, hidden, projection, prototypes, batch_norm=True) for _ in range(2)
            )
        self.teacher = Teacher(backbone, self.head, head)
        self.loss = DINOLoss(
            prototypes,
            teacher_temp=teacher_temperature,
            student_temp=student_temperature,
            center_momentum=centre_momentum,
        )

    def forward(self, backbone: Backbone, views: Tensor) -> Float[Tensor, ""]:
        """See `Method`."""
        student = self.head(backbone(views).float())
        return self.loss(list(self.teacher(views).chunk(2)), list(student.chunk(2)))

    def follow(self, backbone: Backbone, done: float) -> None:
        """See `Method`."""
        self.teacher.follow(backbone, self.head, rising(self.momentum, done))


def rising(momentum: float, done: float) -> float:
    """Return the momentum of a teacher after a share of the training: it rises to 1 along half a cosine."""
    return 1.0 - (1.0 - momentum) * (1.0 + math.cos(math.pi * done)) / 2


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        check_range(f"{KEY}.{name}", width, low=2)


@contextmanager
def _old_weight_norm() -> Iterator[None]:
    """Hide torch's deprecation warning about the weight normalisation that lightly uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        yield
