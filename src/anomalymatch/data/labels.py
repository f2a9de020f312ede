"""Which labels teach."""

from collections.abc import Mapping

from anomalymatch.errors import LabelError
from anomalymatch.types import Label


def training_ids(labels: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Ids labelled anomaly and ids labelled normal, each sorted; unsure and artefact teach nothing.

    Raises:
        LabelError: if either is empty, or a label is none of `Label`.
    """
    anomalies, normals = (ids_labelled(labels, label) for label in (Label.ANOMALY, Label.NORMAL))
    for name, ids in (("anomaly", anomalies), ("normal", normals)):
        if not ids:
            raise LabelError(
                f"none of the {len(labels)} labels is {name!r}: training needs at least one anomaly and one normal"
            )
    return anomalies, normals


def ids_labelled(labels: Mapping[str, str], wanted: Label) -> list[str]:
    """Ids with the label `wanted`, sorted.

    Raises:
        LabelError: if a label is none of `Label`.
    """
    unknown = sorted(set(labels.values()) - set(Label))
    if unknown:
        raise LabelError(f"unknown label {unknown[0]!r}: a label is one of {', '.join(Label)}")
    return sorted(id_ for id_, label in labels.items() if label == wanted)


def have_both_classes(labels: Mapping[str, str]) -> bool:
    """Whether there is at least one anomaly and one normal, as most algorithms need."""
    return {Label.ANOMALY, Label.NORMAL} <= set(labels.values())
