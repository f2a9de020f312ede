"""Tasks for Label Studio: pictures with what people and the model say of them, in its JSON format."""

import base64
import json
from pathlib import Path
from typing import Any

from anomalymatch.data.label_log import LabelEvent
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Label
from anomalymatch.ui.exportable import Exportable, Scored, chosen, scored, standing
from anomalymatch.ui.pictures import THUMBNAIL_TYPE

UNLABELLED = 200
"""Images of the highest scores that are handed over to be labelled, beside those that are."""
SIDE = 512
MODEL = "anomalymatch"
CONFIG = f"""<View>
  <Image name="image" value="$image" zoom="true"/>
  <Choices name="label" toName="image" choice="single" required="true">
{"".join(f'    <Choice value="{label}"/>' + chr(10) for label in Label)}  </Choices>
</View>
"""
"""The labelling interface that a project must have for these tasks (Settings, Labeling Interface, Code)."""


def write_tasks(service: Exportable, path: Path) -> None:
    """Write a list of tasks, one an image, each with its picture inside, so that no server has to serve it.

    Raises:
        DataError: if there is no image to hand over.
    """
    ids = chosen(service, UNLABELLED)
    if not ids:
        raise DataError("there is nothing to export yet: label some images first")
    places, said = scored(service.ranking, ids), standing(service.events)
    with path.open("w", encoding="utf-8") as file:
        separator = "["
        for id_ in ids:
            file.write(separator + json.dumps(_task(service, id_, places.get(id_), said.get(id_, []))))
            separator = ",\n"
        file.write("]\n")


def _task(service: Exportable, id_: str, place: Scored | None, events: list[LabelEvent]) -> dict[str, Any]:
    task: dict[str, Any] = {"data": {"image": _picture(service, id_), "filename": id_}}
    label = service.labels.get(id_)
    if label is not None:
        by_annotator = {event.annotator: event for event in events}
        votes = [event for event in by_annotator.values() if event.label is not None]
        # An annotator is a name here and an account there, so the name goes into the data.
        task["data"]["annotators"] = ", ".join(event.annotator for event in votes)
        task["annotations"] = [_choice(event.label or label) for event in votes] or [_choice(label)]
    if place is not None:
        task["data"] |= {"score": place.score, "rank": place.rank}
        guess = Label.ANOMALY if place.score >= 0.5 else Label.NORMAL
        task["predictions"] = [{"model_version": MODEL, "score": place.score, **_choice(guess)}]
    return task


def _choice(label: Label) -> dict[str, Any]:
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [str(label)]}}
    return {"result": [result]}


def _picture(service: Exportable, id_: str) -> str:
    """The picture as a data URI; a transparent pixel for an image that cannot be read."""
    try:
        data, kind = service.pictures.thumbnail(id_, SIDE), THUMBNAIL_TYPE
    except UnreadableImageError:
        return "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
