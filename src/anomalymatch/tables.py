"""Tables on the terminal."""

import math
from collections.abc import Collection, Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from anomalymatch.terminal import console


def print_table(
    rows: Sequence[Mapping[str, object]],
    columns: Mapping[str, str] | None = None,
    *,
    left: Collection[str] = (),
    title: str = "",
) -> None:
    """Print rows as a table; numbers have three decimals, NaN is shown as a dash.

    Args:
        rows: cells by column. A missing cell or None is empty; other texts are shown as they are.
        columns: heading of each column, in order; None takes the keys of the first row.
        left: columns that are aligned to the left, such as ids; the others are aligned to the right.
        title: line above the table.
    """
    headings = columns if columns is not None else {key: key for key in (rows[0] if rows else ())}
    table = Table(header_style="bold", box=SIMPLE, padding=0)
    for key, heading in headings.items():
        table.add_column(Text(heading), justify="left" if key in left else "right")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in headings))
    if title:
        console.print(Text(title), soft_wrap=True)
    console.print(table)


def cell(value: object) -> str:
    """Format a value for a table: floats with three decimals, NaN as a dash, None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
