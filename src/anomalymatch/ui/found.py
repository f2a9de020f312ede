"""The images that were found, as one zip archive with a list of them."""

import csv
import io
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from anomalymatch.data.label_log import export_csv
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Label
from anomalymatch.ui.exportable import Exportable, scored, slug

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
