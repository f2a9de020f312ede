"""HTML tables with pictures, for the representation of results in notebooks."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol, runtime_checkable

from PIL import Image as PillowImage

from anomalymatch.types import Image, Reject

SIDE = 96
"""Longer side of a picture, in pixels."""


@runtime_checkable
class Readable(Protocol):
    """Reader of images by id, such as an `ImageSource`."""

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """Read images; an unreadable one becomes a `Reject`."""
        ...


def html_table(title: str, rows: Sequence[Mapping[str, object]], source: Readable | None) -> str:
    """Format rows as an HTML table, with a picture for each `id` if their source is known."""
    images: list[Image | Reject] = source.read([str(row["id"]) for row in rows]) if source is not None and rows else []
    head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
    lines = []
    for number, row in enumerate(rows):
        cells = [escape(str(value)) for value in row.values()]
        if images:
            image = images[number]
            cells.append(escape(image.reason) if isinstance(image, Reject) else _picture(image))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<p>{escape(title)}</p><table><tr>{head}</tr>{''.join(lines)}</table>"


def _picture(image: Image) -> str:
    """Return an image as an HTML element that holds it; bands beyond the third are left out."""
    shown = PillowImage.fromarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0])
    shown.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
