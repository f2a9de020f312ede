"""Find rare objects in very large sets of images, starting from about five examples.

import anomalymatch as am

task = am.open_task("demo")
labels = am.initial_labels(task, anomalies=5, normals=95, seed=0)
learner = am.make_learner("probe", task)
learner.fit(labels)
print(learner.rank(task.pool).top(10))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalymatch.adapt import adapt
    from anomalymatch.algorithms.augmentation.objects import ObjectAugmentation
    from anomalymatch.algorithms.base import Learner
    from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatches
    from anomalymatch.algorithms.fixmatch.module import FixMatch, FixMatchSpec
    from anomalymatch.build import make_learner, make_text_ranker, rank
    from anomalymatch.build_images import open_task
    from anomalymatch.cluster import cluster
    from anomalymatch.config import compose
    from anomalymatch.data.source import ImageSource
    from anomalymatch.data.sources.memory import from_arrays, from_dataframe, from_dataset, from_paths
    from anomalymatch.data.task import Task, initial_labels, make_task
    from anomalymatch.errors import AnomalyMatchError
    from anomalymatch.evaluation.metrics import evaluate
    from anomalymatch.export import export
    from anomalymatch.label import label
    from anomalymatch.ranking import Ranking
    from anomalymatch.run import run
    from anomalymatch.score import score
    from anomalymatch.types import Label

_HOMES = {
    "AnomalyMatchError": "errors",
    "BatchSpec": "algorithms.fixmatch.batches",
    "FixMatch": "algorithms.fixmatch.module",
    "FixMatchSpec": "algorithms.fixmatch.module",
    "ImageSource": "data.source",
    "Label": "types",
    "Learner": "algorithms.base",
    "MixedBatches": "algorithms.fixmatch.batches",
    "ObjectAugmentation": "algorithms.augmentation.objects",
    "Ranking": "ranking",
    "Task": "data.task",
    "adapt": "adapt",
    "cluster": "cluster",
    "compose": "config",
    "evaluate": "evaluation.metrics",
    "export": "export",
    "from_arrays": "data.sources.memory",
    "from_dataframe": "data.sources.memory",
    "from_dataset": "data.sources.memory",
    "from_paths": "data.sources.memory",
    "initial_labels": "data.task",
    "label": "label",
    "make_learner": "build",
    "make_task": "data.task",
    "make_text_ranker": "build",
    "open_task": "build_images",
    "rank": "build",
    "run": "run",
    "score": "score",
}
__all__ = [
    "AnomalyMatchError",
    "BatchSpec",
    "FixMatch",
    "FixMatchSpec",
    "ImageSource",
    "Label",
    "Learner",
    "MixedBatches",
    "ObjectAugmentation",
    "Ranking",
    "Task",
    "adapt",
    "cluster",
    "compose",
    "evaluate",
    "export",
    "from_arrays",
    "from_dataframe",
    "from_dataset",
    "from_paths",
    "initial_labels",
    "label",
    "make_learner",
    "make_task",
    "make_text_ranker",
    "open_task",
    "rank",
    "run",
    "score",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import anomalymatch` itself is fast."""
    if name == "__version__":
        return import_module("importlib.metadata").version("anomalymatch")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES[name]}")
    # `anomalymatch.run` is also the name of a module, which is callable (see `cli.make_callable`).
    value = home if name == _HOMES[name] else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
