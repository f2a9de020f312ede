"""VOTable files for TOPCAT, Aladin and ESASky."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomalymatch.files import atomic_file

UNITS = {"ra": "deg", "dec": "deg", "separation": "arcsec"}
"""Units of the columns with these names."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_votable(path: Path, columns: Mapping[str, type], rows: Sequence[Sequence[object]]) -> None:
    """Write rows to a VOTable, atomically.

    Args:
        path: the file.
        columns: `str`, `float` or `int` by name, in order.
        rows: cells in the order of the columns; None is a missing number or an empty text. Characters that XML does not
            allow become `?`.

    Raises:
        StorageError: if the file cannot be written.
    """
    # Imported late: it takes half a second, and few commands need it.
    from astropy.table import MaskedColumn, Table

    table = Table()
    for k, (name, kind) in enumerate(columns.items()):
        cells = [row[k] for row in rows]
        if kind is str:
            texts = ["" if cell is None else _NOT_XML.sub("?", str(cell)) for cell in cells]
            table[name] = MaskedColumn(texts, dtype="U")
        else:
            numbers = [kind() if cell is None else cell for cell in cells]
            missing = [cell is None for cell in cells]
            table[name] = MaskedColumn(numbers, mask=missing, dtype=kind, unit=UNITS.get(name))
    with atomic_file(path) as temporary:
        table.write(temporary, format="votable", overwrite=True)
