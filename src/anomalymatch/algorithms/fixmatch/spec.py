"""The hyper-parameters of FixMatch and its siblings."""

from collections.abc import Callable
from dataclasses import dataclass

from anomalymatch.algorithms.fixmatch.weighting import KEY, Alignment, FixedThreshold, Weighting
from anomalymatch.errors import ConfigError

SCHEDULES = ("constant", "cosine_7_16")
TEACHERS = ("student", "ema")
CONSISTENCIES = ("cross_entropy", "squared_error")


@dataclass(frozen=True)
class FixMatchSpec:
    """The hyper-parameters of the loss and of its training.

    Attributes:
        threshold: softmax from which a pseudo-label teaches (tau); None where the weighting has no fixed one.
        unlabelled_weight: weight of the consistency loss (lambda_u).
        ema_decay: decay of the average that scores.
        teacher: who makes the pseudo-labels, the `student` itself or its `ema`.
        schedule: of the learning rate, `constant` or `cosine_7_16`.
        weight_decay: of all weights but those of normalisation layers.
        freeze_batch_norm: keep the pretrained statistics and use them.
        single_forward: push labelled, weak and strong views through the network as one batch with gradients, as
            the paper does. Otherwise the weak views, which need none, go through alone: same loss, less time.
        weighting: makes what weights the pseudo-labels, of the images in the pool and the threshold (a partial).
        alignment: makes what aligns the teacher's predictions to a rate of anomalies (a partial); None aligns nothing.
        consistency: `cross_entropy` with the pseudo-labels, or `squared_error` of the softmaxes (mean teacher).
        rampup: share of the training in which the consistency loss gains its weight.
        layer_decay: learning rate of a layer group of the backbone over that of the one above it.
    """

    threshold: float | None
    unlabelled_weight: float
    ema_decay: float
    teacher: str
    schedule: str
    weight_decay: float
    freeze_batch_norm: bool
    single_forward: bool
    # Older run folders know nothing of what follows, and go on as they began.
    weighting: Callable[..., Weighting] = FixedThreshold
    alignment: Callable[[], Alignment] | None = None
    consistency: str = "cross_entropy"
    rampup: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("schedule", self.schedule, SCHEDULES),
            ("teacher", self.teacher, TEACHERS),
            ("consistency", self.consistency, CONSISTENCIES),
        ):
            if value not in choices:
                raise ConfigError(f"{KEY}.{name} is {value!r}: choose one of {', '.join(choices)}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"{KEY}.ema_decay is {self.ema_decay}: it must lie in [0, 1)")
        if not 0.0 <= self.rampup <= 1.0:
            raise ConfigError(f"{KEY}.rampup is {self.rampup}: it is a share of the training, from 0 to 1")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ConfigError(f"{KEY}.layer_decay is {self.layer_decay}: it must be above 0 and at most 1")
        for name, weight in (("unlabelled_weight", self.unlabelled_weight), ("weight_decay", self.weight_decay)):
            if not weight >= 0.0:
                raise ConfigError(f"{KEY}.{name} is {weight}: it cannot be negative")
        # Made once here only to be looked at: what is wrong shows before anything is written.
        self.make_weighting(0)
        self.make_alignment()

    @property
    def cuts(self) -> bool:
        """Whether a fixed threshold decides from the first step which pseudo-labels teach."""
        return self.threshold is not None and isinstance(self.make_weighting(0), FixedThreshold)

    def make_weighting(self, pool: int) -> Weighting:
        """A fresh weighting for a pool of so many images."""
        return self.weighting(pool, self.threshold)

    def make_alignment(self) -> Alignment:
        """A fresh alignment."""
        return Alignment(prior=None, momentum=0.0) if self.alignment is None else self.alignment()
