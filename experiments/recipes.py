"""What the benchmark compares: tasks, and algorithms with their settings."""

from dataclasses import dataclass

from bench import DATA
from heads import LabelledHead, LabelSpreading, NearestLabelled, Prototype
from probe_miniimagenet import CLASSES, OTHERS


@dataclass(frozen=True)
class Problem:
    """A data set with its rare class.

    Attributes:
        dataset: its configured name.
        anomaly: the rare class or classes, as on the command line.
        size: side of the images in pixels.
        prevalence: to which the anomalies are thinned out; None keeps them all.
        fine_tuned: whether algorithms that train the backbone are measured, too.
    """

    dataset: str
    anomaly: str
    size: int
    prevalence: float | None = None
    fine_tuned: bool = False

    @property
    def words(self) -> list[str]:
        """As on the command line."""
        root = [] if self.dataset == "demo" else [f"data.root={DATA / self.dataset}"]
        thinned = [] if self.prevalence is None else [f"dataset.prevalence={self.prevalence}"]
        return [*root, *thinned, f"dataset.anomaly={self.anomaly}", "dataset.holdout=0"]


@dataclass(frozen=True)
class Recipe:
    """An algorithm with its settings.

    Attributes:
        algorithm: its configured name.
        words: further settings.
        fine_tunes: whether it trains the backbone, for minutes: it gets fewer tasks and draws, and a single training.
        searches: whether it trains anew after each round of labels all the same.
        head: what learns in its place, on the features of its backbone.
    """

    algorithm: str
    words: tuple[str, ...] = ()
    fine_tunes: bool = False
    searches: bool = False
    head: type[LabelledHead] | None = None

    @property
    def backbone(self) -> tuple[str, ...]:
        """Those of its settings that say how the backbone sees: its own probe sees like that, too."""
        return tuple(word for word in self.words if word.startswith("model."))


PROBLEMS = {
    **{name: Problem("miniimagenet", id_, 84, None, name in ("hourglass", "piano")) for name, id_ in CLASSES.items()},
    **{name: Problem("miniimagenet", id_, 84) for name, id_ in OTHERS.items()},
    "airplane": Problem("cifar10", "airplane", 64, 0.01),
    "merger": Problem("galaxyzoo1", "merger", 150, fine_tuned=True),
    "don't know": Problem("galaxyzoo1", "dont_know", 150, fine_tuned=True),
    "edge-on": Problem("galaxyzoo1", "edge_on", 150, 0.01),
    "spirals": Problem("galaxyzoo1", "[spiral_clockwise,spiral_anticlockwise]", 150, 0.01),
    "demo lenses": Problem("demo", "lens_arc", 64),
}
UPRIGHT = "augment.vertical_flip=0"
FEW = ("algorithm.learner.batch.candidates=200", "algorithm.learner.batch.candidate_share=0.5")
THREE_ROUNDS, TAUGHT_BY_LABELS = "algorithm.learner.start_rounds=null", "algorithm.learner.refit_confidence=null"
OF_3_ROUNDS = (THREE_ROUNDS, TAUGHT_BY_LABELS)
"""`fixmatch` with more self-training before it starts, and a probe of the labels alone to rank."""
OF_200 = (*FEW, UPRIGHT, *OF_3_ROUNDS)
"""As that, with fewer candidates, and galaxies not upside down: so siblings and changes were first measured."""
ABLATIONS = {
    "200 candidates": FEW,
    "upright": (UPRIGHT,),
    "labels alone": (TAUGHT_BY_LABELS,),
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
    "gentle views": ("augment.operations=1", "augment.cutout=0"),
    "64 px": ("model.image_size=64",),
    "128 px": ("model.image_size=128",),
    "50 iterations": ("trainer.iterations=50",),
    "250 iterations": ("trainer.iterations=250",),
    "two stages": ("algorithm.learner.trainable_groups=2",),
    "all stages": ("algorithm.learner.trainable_groups=null",),
}
"""What is changed in `fixmatch`, one thing at a time."""
ALONE = "algorithm.learner.guard=warn"
"""What is compared ranks by itself: a guard would put the probe in its place where it does harm."""
SIBLINGS = ("flexmatch", "freematch", "softmatch", "meanteacher")
STRATEGIES = ("auto", "expected", "mixture", "diverse", "distinct", "uncertain", "random")
"""That choose what `top_k` labels, instead of `top`."""
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
"""In pixels, to which images are magnified."""
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
    "plain probe": Recipe("probe", PLAIN),
    "probe, labels alone": Recipe("probe", LABELS_ALONE),
    "probe, 1 round": Recipe("probe", ONE_ROUND),
    "probe, Lite2": Recipe("probe", LITE2),
    **{
        f"{name}, {size} px": Recipe("probe", (*words, f"model.image_size={size}"))
        for name, words in SIZED.items()
        for size in SIZES
    },
    "prototype": Recipe("probe", head=Prototype),
    "nearest labelled": Recipe("probe", head=NearestLabelled),
    "label spreading": Recipe("probe", head=LabelSpreading),
    **{f"probe, {name}": Recipe("probe", (f"al.strategy.name={name}",)) for name in STRATEGIES},
    "knn": Recipe("knn"),
    "fixmatch": Recipe("fixmatch", fine_tunes=True),
    "fixmatch in each round": Recipe("fixmatch", fine_tunes=True, searches=True),
    # With its guard, as the default has it: "fixmatch, 128 px" is the change of one setting, and has none.
    "fixmatch at 128 px": Recipe("fixmatch", ("model.image_size=128",), fine_tunes=True),
    "fixmatch of 3 rounds": Recipe("fixmatch", OF_3_ROUNDS, fine_tunes=True),
    "fixmatch of 3 rounds at 128 px": Recipe("fixmatch", (*OF_3_ROUNDS, "model.image_size=128"), fine_tunes=True),
    "fixmatch of 200": Recipe("fixmatch", OF_200, fine_tunes=True),
    **{
        f"{base}, {name}": Recipe("fixmatch", (*older, *words, ALONE), fine_tunes=True)
        for base, older in {"fixmatch": (), "fixmatch of 200": OF_200}.items()
        for name, words in ABLATIONS.items()
    },
    **{name: Recipe(name, (ALONE,), fine_tunes=True) for name in SIBLINGS},
    **{f"{name} of 200": Recipe(name, (*OF_200, ALONE), fine_tunes=True) for name in SIBLINGS},
    "fixmatch_reference": Recipe("fixmatch_reference", (UPRIGHT,), fine_tunes=True),
}
CHEAP = ["probe", "probe, last layer", "plain probe", "knn"]
