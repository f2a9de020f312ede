"""Rows of a catalogue: ids, positions, sizes, tiles and labels, held as columns."""

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float64, Int32

from anomalymatch.data.labels import find_label, labels_or_truth
from anomalymatch.data.source import IdIndex
from anomalymatch.data.sources.tables import Catalogue, encode
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.text import listed
from anomalymatch.types import Label

USUAL_IDS = ("id", "source_id", "objid")
USUAL_RA = ("ra", "alpha_j2000", "raj2000", "alphawin_j2000", "ra_deg", "right_ascension", "ramean", "_raj2000")
USUAL_DEC = (
    "dec",
    "delta_j2000",
    "dej2000",
    "decj2000",
    "deltawin_j2000",
    "dec_deg",
    "declination",
    "decmean",
    "_dej2000",
)
USUAL_TILE = "tile"
_AT_ONCE = 2**16

Numbers = Float64[np.ndarray, " n"]
Codes = Int32[np.ndarray, " n"]


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns of a catalogue, the arguments `{name}_column` and `tile_columns` of `CatalogueSource`."""

    id: str | None = None
    ra: str | None = None
    dec: str | None = None
    x: str | None = None
    y: str | None = None
    size: str | None = None
    tile: str | None = None
    tiles: tuple[str, ...] = ()
    label: str | None = None

    def __post_init__(self) -> None:
        for one, other in (("ra", "dec"), ("x", "y")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ConfigError(f"dataset.source.{one}_column and {other}_column: give both or none")
        if self.tile is not None and self.tiles:
            raise ConfigError("dataset.source.tile_column and tile_columns: give only one of them")


@dataclass(frozen=True)
class CatalogueRows:
    """Columns of a catalogue that are in use; None where it has no such column.

    Attributes:
        tiles: for each band the code of each row's tile, -1 for none, and the paths; empty without such a column.
        columns: names of the tile columns.
        labels: code of each row's label, -1 for none, and the labels.
    """

    ids: Sequence[str]
    ra: Numbers | None
    dec: Numbers | None
    x: Numbers | None
    y: Numbers | None
    size: Numbers | None
    tiles: tuple[tuple[Codes, list[str]], ...]
    columns: tuple[str, ...]
    labels: tuple[Codes, list[str]] | None


def read_rows(path: Path, names: ColumnNames) -> CatalogueRows:
    """Read the columns with the given or usual names.

    Raises:
        DataError: if the catalogue is damaged, lacks a column, has no rows, or has columns of another type.
    """
    catalogue = Catalogue(path)
    given = {key: value for key, value in vars(names).items() if isinstance(value, str)}
    for key, column in given.items():
        catalogue.require(column, f"{key}_column")
    tiles = tuple(catalogue.require(column, "tile_columns") for column in names.tiles)
    usual_tile = catalogue.find(USUAL_TILE)
    if not tiles and (names.tile or usual_tile):
        tiles = (str(names.tile or usual_tile),)
    id_ = names.id or catalogue.find(*USUAL_IDS)
    ra, dec = (names.ra, names.dec) if names.ra else (catalogue.find(*USUAL_RA), catalogue.find(*USUAL_DEC))
    if ra is None or dec is None:
        ra = dec = None
    if ra is None and names.x is None:
        raise DataError(
            f"{path}: no column has a usual name of a position, {USUAL_RA[0]} and {USUAL_DEC[0]} for example, among "
            f"{listed(catalogue.names)}; give ra_column and dec_column, or x_column and y_column in dataset.source"
        )
    numbers = [name for name in (ra, dec, names.x, names.y, names.size) if name]
    columns = catalogue.read(numbers, [name for name in (id_, names.label, *tiles) if name])
    count = len(next(iter(columns.values())))
    return CatalogueRows(
        ids=_RowIds(path.name.split(".")[0], count, None if id_ is None else _checked_ids(path, id_, columns[id_])),
        ra=columns[ra] if ra else None,
        dec=columns[dec] if dec else None,
        x=columns[names.x] if names.x else None,
        y=columns[names.y] if names.y else None,
        size=columns[names.size] if names.size else None,
        tiles=tuple(encode(columns[name]) for name in tiles),
        columns=tiles,
        labels=encode(columns[names.label]) if names.label else None,
    )


def _checked_ids(path: Path, name: str, array: Any) -> Any:
    missing = array.null_count + int(pc.sum(pc.equal(array, "")).as_py() or 0)
    if missing:
        raise DataError(f"{path}: the id column {name} is empty in {missing:,} of {len(array):,} rows")
    return array


class _RowIds(Sequence[str]):
    """Ids of the rows, made on access: those of an Arrow array, else `{stem}/{row:07d}`."""

    def __init__(self, stem: str, length: int, array: Any = None) -> None:
        self.stem, self.length, self.array = stem, length, array

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        rows = range(self.length)[at]
        return self._id(rows) if isinstance(rows, int) else [self._id(row) for row in rows]

    def _id(self, row: int) -> str:
        return f"{self.stem}/{row:07d}" if self.array is None else self.array[row].as_py()

    def __iter__(self) -> Iterator[str]:
        if self.array is None:
            yield from map(self._id, range(self.length))
            return
        for start in range(0, self.length, _AT_ONCE):
            yield from self.array.slice(start, _AT_ONCE).to_pylist()

    def __len__(self) -> int:
        return self.length


class RowLabels(Mapping[str, str]):
    """Mapping from ids to labels that stores one code for each row; `names` are the labels by code."""

    def __init__(self, ids: Sequence[str], index: IdIndex, codes: Codes, names: Sequence[str]) -> None:
        self.ids, self.index, self.codes, self.names = ids, index, codes, names

    def __getitem__(self, id_: str) -> str:
        if id_ not in self.index:
            raise KeyError(id_)
        return self.names[self.codes[self.index[id_]]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def values(self) -> "_LabelValues":
        """Return all labels in the order of the ids, without a look-up for each."""
        return _LabelValues(self)


class _LabelValues(ValuesView[str]):
    def __init__(self, labels: RowLabels) -> None:
        super().__init__(labels)
        self.labels = labels

    def __iter__(self) -> Iterator[str]:
        return (self.labels.names[code] for code in self.labels.codes)


def labels_or_classes(
    path: Path, rows: CatalogueRows, index: IdIndex
) -> tuple[dict[str, Label], Mapping[str, str] | None]:
    """Return the label column as labels by a person and None, or as {} and the classes of a benchmark."""
    if rows.labels is None:
        return {}, None
    codes, names = rows.labels
    given = np.flatnonzero(codes >= 0)
    if len(given) < len(codes) or all(map(find_label, names)):
        return labels_or_truth({rows.ids[i]: names[codes[i]] for i in given.tolist()}, rows.ids, str(path))
    return {}, RowLabels(rows.ids, index, codes, names)
