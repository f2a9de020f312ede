"""Exports of a search as files (CSV, Parquet, VOTable, zip, Label Studio), and the import of labels."""

import base64
import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32
from scipy.special import expit

from anomalymatch.checks import check_choice
from anomalymatch.data.label_log import LabelEvent, csv_text, export_csv, import_csv, valid_events
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError, LabelError, UnreadableImageError
from anomalymatch.evaluation.dossier import DossierPicture, Find, write_dossier
from anomalymatch.files import storage_errors
from anomalymatch.ranking import Ranking
from anomalymatch.text import csv_cell, safe_name
from anomalymatch.types import Label
from anomalymatch.ui.groups import Groups
from anomalymatch.ui.labels import history_row
from anomalymatch.ui.notes import Notes
from anomalymatch.ui.pictures import AS_TRAINED, THUMBNAIL_TYPE, Pictures, fitted, jpeg
from anomalymatch.ui.sky import decimal, field_of_view, sexagesimal, sky_links
from anomalymatch.ui.views import Tile
from anomalymatch.votable import write_votable

TOP = 1000
"""Number of top-ranked images in a VOTable, besides the labelled ones."""
MAX_IMPORT = 100 * 2**20
UNLABELLED = 200
"""Number of top-ranked images among the Label Studio tasks, besides the labelled ones."""
SIDE = 512
MAX_FINDS, DOSSIER_SIDE, NEAR = 200, 384, 6
SECOND_STRETCH = "asinh"
"""Stretch of the second picture of a dossier: it shows faint parts."""
MODEL = "anomalymatch"
LABEL_STUDIO_CONFIG = f"""<View>
  <Image name="image" value="$image" zoom="true"/>
  <Choices name="label" toName="image" choice="single" required="true">
{"".join(f'    <Choice value="{label}"/>' + chr(10) for label in Label)}  </Choices>
</View>
"""
"""Labelling interface that a Label Studio project needs for these tasks (Settings, Labeling Interface, Code)."""
_COLUMNS = ("file", "id", "score", "rank", "ra", "dec", "group", "star", "note", "fault")
_PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@runtime_checkable
class Exportable(Protocol):
    """Search whose labels and images can be exported; see `LabelService` for the attributes."""

    source: ImageSource
    pictures: Pictures
    groups: Groups
    notes: Notes

    @property
    def labels(self) -> Mapping[str, Label]: ...  # noqa: D102
    @property
    def events(self) -> Sequence[LabelEvent]: ...  # noqa: D102
    @property
    def ranking(self) -> Ranking | None: ...  # noqa: D102
    @property
    def novelty(self) -> Float32[np.ndarray, " n"] | None: ...  # noqa: D102
    def neighbours(self, id_: str, count: int) -> Sequence[Tile]: ...  # noqa: D102


@dataclass(frozen=True)
class Export:
    """Exported file.

    Attributes:
        filename: name for the browser; letters, digits, `-`, `_` and dots only.
        path: a temporary file, which the caller deletes.
    """

    filename: str
    media_type: str
    path: Path


def export(kind: str, service: Exportable) -> Export:
    """Write an export of one of `KINDS` to a temporary file.

    Raises:
        ConfigError: if there is no such kind.
        DataError: if there is nothing to export; the message says what is missing.
        StorageError: if the disk is full.
    """
    check_choice("export", kind, KINDS)
    ending, media_type, write = _KINDS[kind]
    with tempfile.NamedTemporaryFile(prefix="anomalymatch-", suffix=f".{ending.rsplit('.')[-1]}", delete=False) as file:
        path = Path(file.name)
    try:
        with storage_errors(path):
            write(service, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Export(f"{safe_name(service.source.name)}-{ending}", media_type, path)


def refusal(kind: str, service: Exportable) -> str:
    """Return why an export would be refused now; empty if it can be written."""
    check = {
        "votable": _with_coordinates,
        "zip": _anomalies,
        "dossier": _anomalies,
        "labelstudio": _labelled_for_label_studio,
    }.get(kind)
    try:
        if check is not None:
            check(service)
    except DataError as error:
        return str(error)
    return ""


def import_labels(text: str, known_ids: Container[str]) -> dict[str, Label]:
    """Read labels from a CSV `filename,label`. All lines are checked before any is used.

    Raises:
        LabelError: if lines name unknown images or labels, or an image twice; the message quotes the first of them.
    """
    if len(text) > MAX_IMPORT:
        raise LabelError(f"the CSV file has {len(text):,} characters, more than {MAX_IMPORT:,}: split it")
    with tempfile.TemporaryDirectory(prefix="anomalymatch-") as folder:
        path = Path(folder) / "labels.csv"
        with storage_errors(path):
            path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            return import_csv(path, known_ids)
        except LabelError as error:
            raise LabelError(str(error).replace(str(path), "the CSV file")) from None


class _Place(NamedTuple):
    """Place of an image in the ranking."""

    score: float
    rank: int


def _places(ranking: Ranking | None, ids: Iterable[str]) -> dict[str, _Place]:
    """Return score and rank of each of `ids` that is ranked."""
    if ranking is None:
        return {}
    wanted = set(ids)
    rows = zip(ranking.ids, ranking.scores.tolist(), ranking.ranks.tolist(), strict=True)
    return {id_: _Place(score, rank) for id_, score, rank in rows if id_ in wanted}


def _events_by_image(events: Sequence[LabelEvent]) -> dict[str, list[LabelEvent]]:
    """Return the events of each image that were not undone, oldest first."""
    found: dict[str, list[LabelEvent]] = {}
    for event in valid_events(events):
        found.setdefault(event.id, []).append(event)
    return found


def _present_labels(service: Exportable) -> dict[str, Label]:
    """Return the labels of the images that are still in the archive."""
    labels = {}
    for id_, label in service.labels.items():
        with suppress(DataError):
            service.source.position(id_)
            labels[id_] = label
    return labels


def _labelled_and_top(service: Exportable, top: int) -> list[str]:
    """Return the labelled images, then those of the `top` of the ranking that are not labelled."""
    best = [] if service.ranking is None else service.ranking.top(top)
    labels = _present_labels(service)
    ids = [*labels, *(id_ for id_ in best if id_ not in labels)]
    if not ids:
        raise DataError("there is nothing to export yet: label some images first")
    return ids


def _write_parquet(service: Exportable, path: Path) -> None:
    """Write one row for each image of the archive, labelled or not."""
    ids = list(service.source.ids)
    row = {id_: number for number, id_ in enumerate(ids)}
    label, annotator, at = (np.full(len(ids), None, object) for _ in range(3))
    events = _events_by_image(service.events)
    for id_ in service.labels.keys() & row.keys():
        label[row[id_]] = str(service.labels[id_])
        if id_ in events:
            annotator[row[id_]], at[row[id_]] = events[id_][-1].annotator, events[id_][-1].at
    score, rank = np.full(len(ids), np.nan), np.zeros(len(ids), np.int64)
    if service.ranking is not None:
        rows = np.fromiter((row[id_] for id_ in service.ranking.ids), np.int64, len(service.ranking))
        score[rows], rank[rows] = service.ranking.scores, service.ranking.ranks
    novelty = np.full(len(ids), np.nan) if service.novelty is None else expit(service.novelty.astype(np.float64))
    groups, notes = service.groups.names(), service.notes
    columns = {
        "id": pa.array(ids, pa.string()),
        "label": pa.array(label, pa.string()),
        "annotator": pa.array(annotator, pa.string()),
        "at": pa.array(at, pa.timestamp("us", "UTC")),
        "score": pa.array(score, mask=rank == 0),
        "rank": pa.array(rank, mask=rank == 0),
        "group": pa.array([groups.get(id_) for id_ in ids], pa.string()),
        "novelty": pa.array(novelty, mask=np.isnan(novelty)),
        "star": pa.array([notes.get(id_).star for id_ in ids], pa.bool_()),
        "note": pa.array([notes.get(id_).text or None for id_ in ids], pa.string()),
    }
    pq.write_table(pa.table(columns), path)


def _with_coordinates(service: Exportable) -> list[str]:
    """Return the labelled and top-ranked images, if any of them has coordinates."""
    ids = _labelled_and_top(service, TOP)
    if not any(service.pictures.has_coordinates(id_) for id_ in ids):
        raise DataError(
            "these images have no coordinates, which a VOTable needs: they come from FITS headers, or from columns "
            "like ra and dec of a catalogue"
        )
    return ids


def _write_votable(service: Exportable, path: Path) -> None:
    """Write the labelled and top-ranked images that have sky coordinates, for TOPCAT, Aladin and ESASky."""
    ids = _with_coordinates(service)
    places, events = _places(service.ranking, ids), _events_by_image(service.events)
    rows = []
    for id_ in ids:
        coordinates = service.pictures.coordinates(id_)
        if coordinates is not None:
            by = events[id_][-1].annotator if id_ in service.labels and id_ in events else ""
            rows.append((id_, *coordinates, service.labels.get(id_, ""), by, *places.get(id_, (None, None))))
    columns = {"id": str, "ra": float, "dec": float, "label": str, "annotator": str, "score": float, "rank": int}
    write_votable(path, columns, rows)


def _anomalies(service: Exportable) -> list[str]:
    ids = [id_ for id_, label in _present_labels(service).items() if label == Label.ANOMALY]
    if not ids:
        raise DataError("no image is labelled anomaly yet: label one before this export")
    return ids


def _write_zip(service: Exportable, path: Path) -> None:
    """Write the original files of the anomalies, with labels.csv (all labels) and images.csv.

    File names are built from a number and the letters of the id. An id can be any text, `../../x` for example, and
    unpacking the archive must be safe.
    """
    ids = _anomalies(service)
    places, groups = _places(service.ranking, ids), service.groups.names()
    ids.sort(key=lambda id_: places[id_].rank if id_ in places else len(service.source.ids) + 1)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_COLUMNS)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # images are compressed already
        for number, id_ in enumerate(ids, 1):
            name, fault = _add_original(archive, service, number, id_)
            place, sky = places.get(id_, ("", "")), service.pictures.coordinates(id_) or ("", "")
            note, group = service.notes.get(id_), groups.get(id_, "")
            words = (csv_cell(group), "yes" if note.star else "", csv_cell(note.text), csv_cell(fault))
            writer.writerow((name, csv_cell(id_), *place, *sky, *words))
        archive.writestr("images.csv", table.getvalue(), zipfile.ZIP_DEFLATED)
        archive.writestr("labels.csv", csv_text(service.labels), zipfile.ZIP_DEFLATED)


def _write_dossier(service: Exportable, path: Path) -> None:
    """Write the anomalies with pictures, positions, neighbours and history as one HTML file, best first."""
    ids = _anomalies(service)
    places = _places(service.ranking, ids)
    ids.sort(key=lambda id_: places[id_].rank if id_ in places else len(service.source.ids) + 1)
    history: dict[str, list[LabelEvent]] = {}
    for event in service.events:
        history.setdefault(event.id, []).append(event)
    finds = [_find(service, id_, places.get(id_), history.get(id_, [])) for id_ in ids[:MAX_FINDS]]
    some = f", of which the {MAX_FINDS} with the highest scores are shown" if len(ids) > MAX_FINDS else ""
    subtitle = f"{len(ids):,} anomalies among {len(service.source.ids):,} images{some}"
    write_dossier(path, title=f"Found in {service.source.name}", subtitle=subtitle, finds=finds)


def _find(service: Exportable, id_: str, place: _Place | None, events: Sequence[LabelEvent]) -> Find:
    pictures, coordinates = service.pictures, service.pictures.coordinates(id_)
    facts = {"label": str(service.labels[id_])}
    if place is not None:
        facts |= {"score": f"{place.score:.4f}", "rank": f"{place.rank:,} of {len(service.source.ids):,}"}
    if id_ in (groups := service.groups.names()):
        facts["group"] = groups[id_]
    orientation = pictures.orientation(id_)
    if coordinates is not None:
        facts |= {
            "RA, Dec (ICRS)": decimal(coordinates),
            "in hours, degrees": sexagesimal(coordinates),
        }
    if orientation is not None:
        facts["pixel"] = f"{orientation.scale:.3g} arcsec"
    note = service.notes.get(id_)
    facts |= {"note": note.text} if note.text else {}
    facts |= {"star": "yes"} if note.star else {}
    near = []
    for tile in service.neighbours(id_, NEAR):
        caption = f"{tile.label or 'no label'}{'' if tile.score is None else f', score {tile.score:.3f}'}"
        near.append(_dossier_picture(service, tile.id, AS_TRAINED, caption))
    return Find(
        id=id_,
        pictures=[_dossier_picture(service, id_, stretch, stretch) for stretch in (AS_TRAINED, SECOND_STRETCH)],
        facts=facts,
        links=sky_links(coordinates, field_of_view(orientation, pictures.size(id_))),
        history=[history_row(event, events) for event in events],
        neighbours=near,
        metadata={name: text for name, text in pictures.metadata(id_).items() if name != "file"},  # names a folder
    )


def _dossier_picture(service: Exportable, id_: str, stretch: str, caption: str) -> DossierPicture:
    try:
        return DossierPicture(caption, jpeg(fitted(service.pictures.image(id_, stretch=stretch), DOSSIER_SIDE)))
    except UnreadableImageError as error:
        return DossierPicture(f"{caption}: {error}", None)


def _add_original(archive: zipfile.ZipFile, service: Exportable, number: int, id_: str) -> tuple[str, str]:
    """Add an image to a zip archive; return its name there and why it is missing, one of them empty."""
    try:
        data, suffix = service.pictures.original(id_)
    except UnreadableImageError as error:
        return "", f"unreadable: {error}"
    name = f"images/{number:04d}-{safe_name(PurePosixPath(id_).name.rsplit('.', 1)[0])}{suffix}"
    archive.writestr(name, data)
    return name, ""


def _labelled_for_label_studio(service: Exportable) -> list[str]:
    return _labelled_and_top(service, UNLABELLED)


def _write_label_studio(service: Exportable, path: Path) -> None:
    """Write a list of Label Studio tasks, each with its picture as a data URI, so that no server is needed."""
    ids = _labelled_for_label_studio(service)
    places, events = _places(service.ranking, ids), _events_by_image(service.events)
    with path.open("w", encoding="utf-8") as file:
        separator = "["
        for id_ in ids:
            file.write(separator + json.dumps(_task(service, id_, places.get(id_), events.get(id_, []))))
            separator = ",\n"
        file.write("]\n")


def _task(service: Exportable, id_: str, place: _Place | None, events: list[LabelEvent]) -> dict[str, Any]:
    task: dict[str, Any] = {"data": {"image": _data_uri(service, id_), "filename": id_}}
    label = service.labels.get(id_)
    if label is not None:
        by_annotator = {event.annotator: event for event in events}
        votes = [event for event in by_annotator.values() if event.label is not None]
        # Label Studio's annotators are accounts, ours are names: they go into the data.
        task["data"]["annotators"] = ", ".join(event.annotator for event in votes)
        task["annotations"] = [_choice(event.label or label) for event in votes] or [_choice(label)]
    if place is not None:
        task["data"] |= {"score": place.score, "rank": place.rank}
        if place.score >= 0.5:  # the score of a prediction is that of its choice, and ours is that of an anomaly
            task["predictions"] = [{"model_version": MODEL, "score": place.score, **_choice(Label.ANOMALY)}]
    return task


def _choice(label: Label) -> dict[str, Any]:
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [str(label)]}}
    return {"result": [result]}


def _data_uri(service: Exportable, id_: str) -> str:
    """Return the picture as a data URI; a transparent pixel for an unreadable image."""
    try:
        data = service.pictures.thumbnail(id_, SIDE)
    except UnreadableImageError:
        return _PIXEL
    return f"data:{THUMBNAIL_TYPE};base64,{base64.b64encode(data).decode()}"


_KINDS: dict[str, tuple[str, str, Callable[[Exportable, Path], object]]] = {
    "csv": ("labels.csv", "text/csv; charset=utf-8", lambda service, path: export_csv(service.labels, path)),
    "parquet": ("images.parquet", "application/vnd.apache.parquet", _write_parquet),
    "votable": ("sky.vot", "application/x-votable+xml", _write_votable),
    "zip": ("anomalies.zip", "application/zip", _write_zip),
    "dossier": ("dossier.html", "text/html; charset=utf-8", _write_dossier),
    "labelstudio": ("label-studio.json", "application/json", _write_label_studio),
    "labelstudio-config": (
        "label-studio-config.xml",
        "application/xml",
        lambda _, path: path.write_text(LABEL_STUDIO_CONFIG, encoding="utf-8"),
    ),
}
"""End of the file name, media type and function of each kind of export."""
KINDS = tuple(_KINDS)
