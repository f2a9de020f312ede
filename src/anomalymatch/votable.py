"""VOTable files for TOPCAT, Aladin and ESASky."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomalymatch.files import atomic_file

UNITS = {"ra": "deg", "dec": "deg", "separation": "arcsec"}
"""Units of the columns with these names."""
UCDS = {"id": "meta.id;meta.main", "ra": "pos.eq.ra;meta.main", "dec": "pos.eq.dec;meta.main", "rank": "meta.number"}
"""Unified content descriptors (IVOA, UCD1+) of the columns with these names."""
DESCRIPTIONS = {
    "id": "Image",
    "ra": "Right ascension (ICRS)",
    "dec": "Declination (ICRS)",
    "label": "Current label: anomaly, normal, unsure or artefact",
    "annotator": "Person who gave the label",
    "score": "Probability of being an anomaly, by the ranking",
    "logit": "Log-odds of being an anomaly, by the ranking",
    "rank": "Place in the ranking, 1 for the highest score",
}
"""Descriptions of the columns with these names."""
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
    from astropy.io.votable import from_table
    from astropy.io.votable.tree import CooSys
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
    file = from_table(table)
    (resource,) = file.resources
    resource.coordinate_systems.append(CooSys(ID="icrs", system="ICRS"))
    for field in resource.tables[0].fields:
        field.ucd, field.description = UCDS.get(field.name), DESCRIPTIONS.get(field.name)
        field.ref = "icrs" if field.name in ("ra", "dec") else None
    with atomic_file(path) as temporary:
        file.to_xml(str(temporary))
