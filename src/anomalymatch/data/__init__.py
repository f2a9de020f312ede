"""Image archives: sources of images, their rendering and decoding, tasks on benchmarks, and labels.

`ImageSource` is the base class of all sources, and `open_path` opens a folder or archive. `sources` has a module for
each format, `convert` packs images into Parquet shards, `stream` decodes batches ahead of the model, and `download` and
`remote` read URLs.
"""

from anomalymatch.data.label_log import LabelEvent, LabelLog, export_csv, import_csv
from anomalymatch.data.labels import as_labels, have_both_classes, ids_labelled, training_ids
from anomalymatch.data.open import open_path
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import ImageSource
from anomalymatch.data.task import Task, initial_labels, make_task

__all__ = [
    "ImageSource",
    "LabelEvent",
    "LabelLog",
    "Rendering",
    "Task",
    "as_labels",
    "export_csv",
    "have_both_classes",
    "ids_labelled",
    "import_csv",
    "initial_labels",
    "make_task",
    "open_path",
    "training_ids",
]
