"""What leaves the page as a file, and the labels that come in as one."""

import base64
import csv
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64
from scipy.special import expit

from anomalymatch.data.label_log import LabelEvent, export_csv, import_csv
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import ConfigError, DataError, LabelError, UnreadableImageError
from anomalymatch.files import storage_errors
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label
from anomalymatch.ui.groups import Groups
from anomalymatch.ui.pictures import THUMBNAIL_TYPE, Pictures


@runtime_checkable
class Exportable(Protocol):
    """What an export needs to know of the search."""

    @property
    def source(self) -> ImageSource:
        """The images."""

    @property
    def labels(self) -> Mapping[str, Label]:
        """The label that counts, by id."""

    @property
    def events(self) -> Sequence[LabelEvent]:
        """What was said, oldest first: all of it, or at least the event of each label that counts."""

    @property
    def ranking(self) -> Ranking | None:
        """The latest one, if there is any."""

    @property
    def novelty(self) -> Float32[np.ndarray, " n"] | None:
        """How unlike the others each image of the source is, as log-odds; NaN if it cannot be read."""

    @property
    def groups(self) -> Groups:
        """Kinds of images."""

    @property
    def pictures(self) -> Pictures:
        """Of the images."""


class Scored(NamedTuple):
    """The place of an image in the ranking."""

    score: float
    rank: int


def slug(text: str) -> str:
    """Text as a part of a file name that is safe everywhere; never empty, never hidden."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:60] or "images"


def scored(ranking: Ranking | None, ids: Iterable[str] | None = None) -> dict[str, Scored]:
    """Score and rank by id, for those of `ids` (None for all) that the ranking has."""
    if ranking is None:
        return {}
    wanted = None if ids is None else set(ids)
    rows = zip(ranking.ids, ranking.scores.tolist(), ranks(ranking).tolist(), strict=True)
    return {id_: Scored(score, rank) for id_, score, rank in rows if wanted is None or id_ in wanted}


def standing(events: Sequence[LabelEvent]) -> dict[str, list[LabelEvent]]:
    """The events of each image that nobody has taken back, oldest first."""
    undone = {event.undoes for event in events}
    found: dict[str, list[LabelEvent]] = {}
    for event in events:
        if event.undoes is None and event.sequence not in undone:
            found.setdefault(event.id, []).append(event)
    return found


def chosen(service: Exportable, top: int) -> list[str]:
    """The labelled images, then the `top` of the ranking that are not among them."""
    best = [] if service.ranking is None else service.ranking.top(top)
    return [*service.labels, *(id_ for id_ in best if id_ not in service.labels)]


def ranks(ranking: Ranking) -> Int64[np.ndarray, " n"]:
    """The rank of each of the ranking's images, 1 for the highest score."""
    places = np.empty(len(ranking), np.int64)
    places[ranking.order] = np.arange(1, len(ranking) + 1)
    return places


_COLUMNS = ("file", "id", "score", "rank", "ra", "dec", "note")


def write_found(service: Exportable, path: Path) -> None:
    """Write the images labelled anomaly, as they lie in the archive, with labels.csv (all labels) and images.csv.

    Their names are made from a number and the letters of the id: an id may be anything, `../../x` for example, and
    whoever unpacks the archive must not have to trust it.

    Raises:
        DataError: if no image is labelled anomaly.
    """
    ids = [id_ for id_, label in service.labels.items() if label == Label.ANOMALY]
    if not ids:
        raise DataError("no image is labelled anomaly yet, so there are no found images to export")
    places = scored(service.ranking, ids)
    ids.sort(key=lambda id_: places[id_].rank if id_ in places else len(service.source.ids) + 1)
    rows: list[tuple[object, ...]] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # images are compressed already
        for number, id_ in enumerate(ids, 1):
            name, note = _add(archive, service, number, id_)
            score, rank = places.get(id_, ("", ""))
            rows.append((name, id_, score, rank, *(service.pictures.coordinates(id_) or ("", "")), note))
        archive.writestr("images.csv", _csv(rows), zipfile.ZIP_DEFLATED)
        archive.writestr("labels.csv", _labels(service), zipfile.ZIP_DEFLATED)


def _add(archive: zipfile.ZipFile, service: Exportable, number: int, id_: str) -> tuple[str, str]:
    """Add an image; return its name in the archive and a note, of which one is empty."""
    try:
        data, suffix = service.pictures.original(id_)
    except UnreadableImageError as error:
        return "", f"unreadable: {error}"
    name = f"images/{number:04d}-{slug(PurePosixPath(id_).name.rsplit('.', 1)[0])}{suffix}"
    archive.writestr(name, data)
    return name, ""


def _csv(rows: list[tuple[object, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def _labels(service: Exportable) -> bytes:
    with tempfile.TemporaryDirectory(prefix="anomalymatch-") as folder:
        path = Path(folder) / "labels.csv"
        export_csv(service.labels, path)
        return path.read_bytes()


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


TOP = 1000
"""Images of the highest scores that a table holds beside the labelled ones."""
MAX_IMPORT = 100 * 2**20
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Export:
    """A file to be downloaded.

    Attributes:
        filename: what the browser shall call it; letters, digits, `-`, `_` and dots only.
        media_type: of its contents.
        path: a temporary file, which whoever asked for it removes.
    """

    filename: str
    media_type: str
    path: Path


class _Kind(NamedTuple):
    ending: str
    media_type: str
    write: Callable[[Exportable, Path], None]


def export(kind: str, service: Exportable) -> Export:
    """Write an export of one of `KINDS` to a temporary file.

    Raises:
        ConfigError: if there is no such kind.
        DataError: if there is nothing to export; the message says what is missing.
        StorageError: if the disk is full.
    """
    if kind not in _KINDS:
        raise ConfigError(f"there is no export {kind!r}: choose one of {', '.join(KINDS)}")
    ending, media_type, write = _KINDS[kind]
    with tempfile.NamedTemporaryFile(prefix="anomalymatch-", suffix=f".{ending.rsplit('.')[-1]}", delete=False) as file:
        path = Path(file.name)
    try:
        with storage_errors(path):
            write(service, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Export(f"{slug(service.source.name)}-{ending}", media_type, path)


def import_labels(text: str, known_ids: Container[str]) -> dict[str, Label]:
    """Read labels from the text of a CSV `filename,label`; all lines are checked before one is used.

    Raises:
        LabelError: if lines name unknown images or labels, or an image twice; the first of them are quoted.
    """
    if len(text) > MAX_IMPORT:
        raise LabelError(f"the CSV file has more than {MAX_IMPORT:,} characters: divide it")
    with tempfile.TemporaryDirectory(prefix="anomalymatch-") as folder:
        path = Path(folder) / "labels.csv"
        with storage_errors(path):
            path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            return import_csv(path, known_ids)
        except LabelError as error:
            raise LabelError(str(error).replace(str(path), "the CSV file")) from None


def _write_csv(service: Exportable, path: Path) -> None:
    export_csv(service.labels, path)


def _write_parquet(service: Exportable, path: Path) -> None:
    """A row for each image of the archive, labelled or not."""
    ids = list(service.source.ids)
    row = {id_: number for number, id_ in enumerate(ids)}
    label, annotator, at = (np.full(len(ids), None, object) for _ in range(3))
    said = standing(service.events)
    for id_ in service.labels.keys() & row.keys():
        label[row[id_]] = str(service.labels[id_])
        if id_ in said:
            annotator[row[id_]], at[row[id_]] = said[id_][-1].annotator, said[id_][-1].at
    score, rank = np.full(len(ids), np.nan), np.zeros(len(ids), np.int64)
    if service.ranking is not None:
        rows = np.fromiter((row[id_] for id_ in service.ranking.ids), np.int64, len(service.ranking))
        score[rows], rank[rows] = service.ranking.scores, ranks(service.ranking)
    novelty = np.full(len(ids), np.nan) if service.novelty is None else expit(service.novelty.astype(np.float64))
    groups = service.groups.names()
    columns = {
        "id": pa.array(ids, pa.string()),
        "label": pa.array(label, pa.string()),
        "annotator": pa.array(annotator, pa.string()),
        "at": pa.array(at, pa.timestamp("us", "UTC")),
        "score": pa.array(score, mask=rank == 0),
        "rank": pa.array(rank, mask=rank == 0),
        "group": pa.array([groups.get(id_) for id_ in ids], pa.string()),
        "novelty": pa.array(novelty, mask=np.isnan(novelty)),
    }
    pq.write_table(pa.table(columns), path)


def _write_votable(service: Exportable, path: Path) -> None:
    """Labelled images and the top of the ranking that have a place on the sky, for TOPCAT, Aladin and ESASky."""
    ids = chosen(service, TOP)
    if not ids:
        raise DataError("there is nothing to export yet: label some images first")
    found = [(id_, service.pictures.coordinates(id_)) for id_ in ids]
    placed = [(id_, place) for id_, place in found if place is not None]
    if not placed:
        raise DataError(
            "these images have no coordinates, which a VOTable needs: they come from FITS headers, or from columns "
            "like ra and dec of a catalogue"
        )
    from astropy import units
    from astropy.table import MaskedColumn, Table

    places, said = scored(service.ranking, ids), standing(service.events)
    empty = Scored(np.nan, 0)
    rows = [places.get(id_, empty) for id_, _ in placed]
    unknown = [id_ not in places for id_, _ in placed]
    by = [said[id_][-1].annotator if id_ in service.labels and id_ in said else "" for id_, _ in placed]
    table = Table(
        {
            "id": [_xml(id_) for id_, _ in placed],
            "ra": [place[0] for _, place in placed] * units.deg,
            "dec": [place[1] for _, place in placed] * units.deg,
            "label": [str(service.labels.get(id_, "")) for id_, _ in placed],
            "annotator": [_xml(name) for name in by],
            "score": MaskedColumn([row.score for row in rows], mask=unknown, dtype=np.float64),
            "rank": MaskedColumn([row.rank for row in rows], mask=unknown, dtype=np.int64),
        }
    )
    table.write(path, format="votable", overwrite=True)


def _xml(text: str) -> str:
    """XML has no way to write control characters."""
    return _NOT_XML.sub("?", text)


_KINDS = {
    "csv": _Kind("labels.csv", "text/csv; charset=utf-8", _write_csv),
    "parquet": _Kind("images.parquet", "application/vnd.apache.parquet", _write_parquet),
    "votable": _Kind("sky.vot", "application/x-votable+xml", _write_votable),
    "zip": _Kind("anomalies.zip", "application/zip", write_found),
    "labelstudio": _Kind("label-studio.json", "application/json", write_tasks),
}
KINDS = tuple(_KINDS)
