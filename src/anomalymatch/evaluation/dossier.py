"""Dossier of what a search has found, as one self-contained HTML file for a colleague."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalymatch.evaluation.report import render_html
from anomalymatch.files import write_text


@dataclass(frozen=True, slots=True)
class DossierPicture:
    """Picture with a caption: the bytes of a JPEG; None if the image cannot be read, and the caption says why."""

    caption: str
    jpeg: bytes | None

    @property
    def uri(self) -> str:
        """The picture as a data URI; empty without one."""
        return "" if self.jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class Find:
    """Image that was found, all as plain text, which is escaped.

    Attributes:
        pictures: of the image itself.
        facts: value by name, such as score, rank and position.
        links: addresses by name.
        history: time and text of each label event.
        neighbours: the most similar images.
        metadata: value by name, folded.
    """

    id: str
    pictures: Sequence[DossierPicture]
    facts: Mapping[str, str]
    links: Mapping[str, str]
    history: Sequence[tuple[str, str]]
    neighbours: Sequence[DossierPicture]
    metadata: Mapping[str, str]


def write_dossier(path: Path, *, title: str, subtitle: str, finds: Sequence[Find]) -> None:
    """Write finds as one HTML file with embedded pictures, without scripts or external resources.

    Raises:
        StorageError: if `path` cannot be written.
    """
    write_text(path, render_html("dossier.html.j2", title=title, subtitle=subtitle, finds=finds))
