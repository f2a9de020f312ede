"""Define the tasks and algorithms of the benchmark."""

from dataclasses import dataclass

from bench import ALONE, dataset_overrides
from heads import LabelledHead, LabelSpreading, NearestLabelled, Prototype
from probe_miniimagenet import CLASSES, OTHER_CLASSES

from anomalymatch import open_task
from anomalymatch.data.task import Task


@dataclass(frozen=True)
class Problem:
    """Data set with its rare class.

    Attributes:
        dataset: name of the data set's configuration.
        anomaly: the rare class or classes, as on the command line.
        size: image side in pixels.
        prevalence: share of anomalies to which the pool is thinned; None keeps all of them.
        fine_tuned: also measure algorithms that train the backbone.
    """

    dataset: str
    anomaly: str
    size: int
    prevalence: float | None = None
    fine_tuned: bool = False

    @property
    def overrides(self) -> list[str]:
        """The task on the command line; the data set comes first."""
        dataset = ["dataset=demo"] if self.dataset == "demo" else dataset_overrides(self.dataset)
        thinned = [] if self.prevalence is None else [f"dataset.prevalence={self.prevalence}"]
        return [*dataset, *thinned, f"dataset.anomaly={self.anomaly}", "dataset.holdout=0"]

    def open_task(self, *overrides: str) -> Task:
        """Open the task with further overrides."""
        return open_task(self.dataset, *self.overrides[1:], *overrides)


@dataclass(frozen=True)
class Recipe:
    """Algorithm with its settings.

    Attributes:
        algorithm: name of the algorithm's configuration.
        overrides: further settings.
        fine_tunes: the algorithm trains the backbone, which takes minutes: it gets fewer tasks and a single training.
        searches: the algorithm is trained after each round of labels although it trains the backbone.
        head: a classifier that replaces the algorithm on the features of its backbone.
    """

    algorithm: str
    overrides: tuple[str, ...] = ()
    fine_tunes: bool = False
    searches: bool = False
    head: type[LabelledHead] | None = None

    @property
    def backbone(self) -> tuple[str, ...]:
        """The settings of the backbone; the probe that the algorithm is compared with shares them."""
        return tuple(override for override in self.overrides if override.startswith("model."))


PROBLEMS = {
    **{name: Problem("miniimagenet", id_, 84, None, name in ("hourglass", "piano")) for name, id_ in CLASSES.items()},
    **{name: Problem("miniimagenet", id_, 84) for name, id_ in OTHER_CLASSES.items()},
    "airplane": Problem("cifar10", "airplane", 64, 0.01),
    "merger": Problem("galaxyzoo1", "merger", 150, fine_tuned=True),
    "don't know": Problem("galaxyzoo1", "dont_know", 150, fine_tuned=True),
    "edge-on": Problem("galaxyzoo1", "edge_on", 150, 0.01),
    "spirals": Problem("galaxyzoo1", "[spiral_clockwise,spiral_anticlockwise]", 150, 0.01),
    "demo lenses": Problem("demo", "lens_arc", 64),
}
LAST_LOOK = {
    "malamute": Problem("miniimagenet", "n02110063", 84, fine_tuned=True),
    "frog": Problem("cifar10", "frog", 64, 0.01, fine_tuned=True),
}
"""Tasks that are set aside for a last look at the finished program; nothing is chosen or tuned on them."""
LAST_LOOK_DRAW = 100
"""First draw of the last look, which no other measurement uses."""
OBJECTS, UPRIGHT = "augment=objects", "augment.vertical_flip=0.0"
FEW = ("algorithm.learner.batch.candidates=200", "algorithm.learner.batch.candidate_share=0.5")
THREE_ROUNDS, REFIT_ON_LABELS = "algorithm.learner.start_rounds=null", "algorithm.learner.refit_confidence=null"
OF_3_ROUNDS = (ALONE, THREE_ROUNDS, REFIT_ON_LABELS)
"""`fixmatch` that starts from three rounds of self-training and refits its last probe on the labels alone."""
OF_200 = (*FEW, OBJECTS, UPRIGHT, *OF_3_ROUNDS)
"""The same with 200 candidates and no vertical flips; variants and ablations were first measured with it."""
ABLATIONS = {
    "200 candidates": FEW,
    "upright": (OBJECTS, UPRIGHT),
    "labels alone": (REFIT_ON_LABELS,),
    "3 rounds": (THREE_ROUNDS,),
    "all alike": ("algorithm.learner.batch.candidate_share=0",),
    "prior 0.01": ("algorithm.learner.loss.alignment.prior=0.01",),
    "trained head": ("algorithm.learner.refit=false",),
    "cold": ("algorithm.learner.start=cold", "algorithm.learner.refit=false"),
    "threshold 0.6": ("algorithm.learner.loss.threshold=0.6",),
    "threshold 0.95": ("algorithm.learner.loss.threshold=0.95",),
    "student teaches": ("algorithm.learner.loss.teacher=student",),
    "average 0.99": ("algorithm.learner.loss.ema_decay=0.99",),
    "5 crops": ("model.crops=5",),
    "gentle views": (OBJECTS, "augment.operations=1", "augment.cutout=0"),
    "64 px": ("model.image_size=64",),
    "128 px": ("model.image_size=128",),
    "50 iterations": ("trainer.iterations=50",),
    "250 iterations": ("trainer.iterations=250",),
    "two stages": ("algorithm.learner.trainable_groups=2",),
    "all stages": ("algorithm.learner.trainable_groups=null",),
}
"""Changes to `fixmatch`, one setting each."""
NO_FALLBACK = "algorithm.learner.guard=warn"
"""Keeps the guard from replacing a harmful training by the probe, so that the training itself is measured."""
VARIANTS = ("flexmatch", "freematch", "softmatch", "meanteacher")
STRATEGIES = ("auto", "expected", "mixture", "diverse", "distinct", "uncertain", "random")
"""Query strategies that are compared with `top`."""
PLAIN = ("model.stages=false", "probe.orientations=1", "probe.rounds=0")
AS_CONFIGURED = (
    "model.image_size=${dataset.image_size}",
    "model.crops=${oc.select:dataset.crops,0}",
    "probe.orientations=${oc.select:dataset.orientations,2}",
)
LITE2 = ("model=efficientnet_lite2",)
LITES = ("model=efficientnet_lites", "model.stages=true", "model.orientations=1")
LABELS_ALONE, ONE_ROUND = ("probe.rounds=0",), ("probe.rounds=1",)
SIZES = (96, 128, 160, 224, 300)
"""Image sides in pixels at which the probes of `SIZED` are measured."""
SIZED = {
    "probe": (),
    "plain probe": PLAIN,
    "probe, Lite2": LITE2,
    "probe, labels alone": LABELS_ALONE,
    "probe, 1 round": ONE_ROUND,
}
RECIPES = {
    "probe": Recipe("probe"),
    "probe, as configured": Recipe("probe", AS_CONFIGURED),
    "probe, 8 views": Recipe("probe", ("model.orientations=8",)),
    "probe, 2 views": Recipe("probe", ("model.orientations=2",)),
    "probe, 1 crop": Recipe("probe", ("model.crops=1",)),
    "probe, 5 crops": Recipe("probe", ("model.crops=5",)),
    "probe, 5 crops, auto": Recipe("probe", ("model.crops=5", "al.strategy.name=auto")),
    "probe, 5 crops, 2 views": Recipe("probe", ("model.crops=5", "model.orientations=2")),
    "probe, 5 crops, 8 views": Recipe("probe", ("model.crops=5", "model.orientations=8", "probe.orientations=1")),
    "probe, confidence 0.9": Recipe("probe", ("probe.confidence=0.9",)),
    "probe, 5 crops, lites": Recipe("probe", (*LITES, "model.crops=5")),
    "probe, 5 crops, turned": Recipe("probe", ("model.crops=5", "probe.orientations=8")),
    "probe, turned": Recipe("probe", ("probe.orientations=8",)),
    "probe, not mirrored": Recipe("probe", ("probe.orientations=1",)),
    "probe, calibrated": Recipe("probe", ("probe.calibration=platt",)),
    "probe, last layer": Recipe("probe", ("model.stages=false", "probe.orientations=1")),
    **{name: Recipe("probe", overrides) for name, overrides in SIZED.items() if overrides},
    **{
        f"{name}, {size} px": Recipe("probe", (*overrides, f"model.image_size={size}"))
        for name, overrides in SIZED.items()
        for size in SIZES
    },
    "prototype": Recipe("probe", head=Prototype),
    "nearest labelled": Recipe("probe", head=NearestLabelled),
    "label spreading": Recipe("probe", head=LabelSpreading),
    **{f"probe, {name}": Recipe("probe", (f"al.strategy.name={name}",)) for name in STRATEGIES},
    "knn": Recipe("knn"),
    "fixmatch": Recipe("fixmatch", (ALONE,), fine_tunes=True),
    "fixmatch with the probe": Recipe("fixmatch", fine_tunes=True),
    "fixmatch in each round": Recipe("fixmatch", (ALONE,), fine_tunes=True, searches=True),
    # With the guard of the default, unlike the ablation "fixmatch, 128 px".
    "fixmatch at 128 px": Recipe("fixmatch", (ALONE, "model.image_size=128"), fine_tunes=True),
    "fixmatch of 3 rounds": Recipe("fixmatch", OF_3_ROUNDS, fine_tunes=True),
    "fixmatch of 3 rounds at 128 px": Recipe("fixmatch", (*OF_3_ROUNDS, "model.image_size=128"), fine_tunes=True),
    "fixmatch of 200": Recipe("fixmatch", OF_200, fine_tunes=True),
    **{
        f"{base}, {name}": Recipe("fixmatch", (*common, *overrides, NO_FALLBACK), fine_tunes=True)
        for base, common in {"fixmatch": (ALONE,), "fixmatch of 200": OF_200}.items()
        for name, overrides in ABLATIONS.items()
    },
    **{name: Recipe(name, (ALONE, NO_FALLBACK), fine_tunes=True) for name in VARIANTS},
    **{f"{name} of 200": Recipe(name, (*OF_200, NO_FALLBACK), fine_tunes=True) for name in VARIANTS},
    "fixmatch_reference": Recipe("fixmatch_reference", (UPRIGHT,), fine_tunes=True),
}
CHEAP = ["probe", "probe, last layer", "plain probe", "knn"]
"""Algorithms that are measured by default; none trains the backbone."""
