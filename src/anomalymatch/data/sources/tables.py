"""Tables of metadata: catalogues in CSV, Parquet, FITS or VOTable, and Parquet files beside images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from jaxtyping import Float64, Int32

from anomalymatch.data.find import damaged_file
from anomalymatch.data.warning_filter import ASTROPY, ignore_warnings
from anomalymatch.errors import DataError
from anomalymatch.text import listed, reason

logger = logging.getLogger(__name__)

SUFFIXES = {
    "csv": (".csv", ".csv.gz"),
    "parquet": (".parquet", ".pq"),
    "fits": (".fits", ".fit", ".fits.gz"),
    "votable": (".vot", ".votable", ".xml"),
}
_Reader = Callable[[Sequence[str], Sequence[str]], dict[str, pa.Array]]


class Catalogue:
    """Catalogue whose columns are read on demand.

    Args:
        path: the file; its suffix tells the format.

    Attributes:
        names: names of all columns.

    Raises:
        DataError: if the file is missing, damaged, or of an unknown format, or if two columns have one name.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing"
            raise DataError(f"{path}: expected a catalogue, found {found}; set data.root to a file")
        kind = next((kind for kind, ends in SUFFIXES.items() if path.name.lower().endswith(ends)), None)
        if kind is None:
            known = ", ".join(end for ends in SUFFIXES.values() for end in ends)
            raise DataError(f"{path}: a catalogue must end in one of {known}")
        self.path = path
        self.names: list[str]
        self._read: _Reader
        with _catalogue_errors(path):
            self.names, self._read = _OPEN[kind](path)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the names of columns must be unique, but {listed(twice)} occurs more than once")

    def require(self, name: str, option: str) -> str:
        """Return `name` if there is such a column."""
        if name not in self.names:
            raise DataError(
                f"{self.path}: there is no column {name}, which dataset.source.{option} names, "
                f"only {listed(self.names)}"
            )
        return name

    def find(self, *usual: str) -> str | None:
        """Return the first of the `usual` names that a column has, in any case."""
        by_lower = {name.lower(): name for name in reversed(self.names)}
        return next((by_lower[name] for name in usual if name in by_lower), None)

    def read(self, numbers: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        """Read columns: `numbers` as float64 arrays with NaN for missing values, `texts` as Arrow strings."""
        wanted = list(dict.fromkeys([*numbers, *texts]))
        with _catalogue_errors(self.path):
            columns = self._read(wanted, texts)
        made: dict[str, Any] = {name: self._numbers(name, columns[name]) for name in numbers}
        return made | {name: self._texts(name, columns[name]) for name in texts}

    def _numbers(self, name: str, column: Any) -> Float64[np.ndarray, " n"]:
        try:
            values = pc.cast(column, pa.float64(), safe=False)
        except pa.ArrowException:
            raise DataError(f"{self.path}: the column {name} must hold numbers, found {column.type}") from None
        return values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()

    def _texts(self, name: str, column: Any) -> Any:
        try:
            array = pc.cast(column, pa.large_string())
        except pa.ArrowException:
            raise DataError(f"{self.path}: the column {name} must hold text, found {column.type}") from None
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def encode(texts: Any) -> tuple[Int32[np.ndarray, " n"], list[str]]:
    """Encode strings as codes into a list of distinct strings; null and the empty string are -1."""
    encoded = pc.dictionary_encode(pc.if_else(pc.equal(texts, ""), None, texts))
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int32), encoded.dictionary.to_pylist()


@contextmanager
def _catalogue_errors(path: Path) -> Iterator[None]:
    try:
        with ignore_warnings(ASTROPY):
            yield
    except Exception as error:  # damage can make a parser raise anything
        raise DataError(f"{path}: the catalogue cannot be read: {reason(error)}") from None


def _open_csv(path: Path) -> tuple[list[str], _Reader]:
    with pa_csv.open_csv(path) as reader:
        written = {name.strip(): name for name in reader.schema.names}  # a header may have spaces around the names
        names = [name.strip() for name in reader.schema.names]

    def read(columns: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        types = {written[name]: pa.string() if name in texts else pa.float64() for name in columns}
        options = pa_csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=False)
        table = pa_csv.read_csv(path, convert_options=options)
        spaced = any(name != written[name] for name in names)
        return {
            n: pc.utf8_trim_whitespace(table[written[n]]) if spaced and n in texts else table[written[n]]
            for n in columns
        }

    return names, read


def _open_parquet(path: Path) -> tuple[list[str], _Reader]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names

    def read(columns: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(columns))
        return {name: table[name] for name in columns}

    return names, read


def _open_fits(path: Path) -> tuple[list[str], _Reader]:
    from astropy.io import fits  # late, as below: a start of most commands has no need of astropy

    from anomalymatch.data.sources.fits_file import FitsFile, Place

    def table(file: FitsFile) -> Any:
        first = next((hdu for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU | fits.TableHDU)), None)
        if first is None:
            raise DataError("there is no table in it")
        file.check_complete(Place.of(first))
        return first

    def read(columns: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        with closing(FitsFile(path)) as file:
            hdu = table(file)
            return {name: _arrow(np.asarray(hdu.data[name]), hdu.columns[name].null) for name in columns}

    with closing(FitsFile(path)) as file:
        return [name or "" for name in table(file).columns.names], read  # a column may have no name


def _open_votable(path: Path) -> tuple[list[str], _Reader]:
    from astropy.io.votable import parse_single_table

    table = parse_single_table(path).to_table(use_names_over_ids=True)

    def read(columns: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        made = {}
        for name in columns:
            values = np.ma.asarray(table[name])
            made[name] = _arrow(np.asarray(values.data), mask=np.ma.getmaskarray(values))
        return made

    return list(table.colnames), read


def _arrow(values: np.ndarray, null: Any = None, mask: np.ndarray | None = None) -> Any:
    if values.ndim != 1:
        raise DataError(f"a column of the shape {values.shape} does not hold one value a row")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind in "iuf":
        values = values.astype(values.dtype.newbyteorder("="))
    if isinstance(null, int) and values.dtype.kind in "iu":
        mask = values == null
    return pa.array(values.tolist() if values.dtype.kind in "UO" else values, mask=mask)


_OPEN = {"csv": _open_csv, "parquet": _open_parquet, "fits": _open_fits, "votable": _open_votable}


MAX_BYTES = 2**28
"""Largest size of the text in a table; further columns are left out."""
_AT_ONCE = 16


def catalogue_table(path: Path) -> pa.Table | None:
    """Read all columns of a catalogue with one value in each row, as text; None if there are none."""
    catalogue = Catalogue(path)
    columns = _Columns(str(path))
    for start in range(0, len(catalogue.names), _AT_ONCE):
        if columns.full:
            break
        names = catalogue.names[start : start + _AT_ONCE]
        for name, array in _read(catalogue, names).items():
            columns.add(name, array)
    return columns.table()


def parquet_table(files: Sequence[tuple[Path | None, int]], leave_out: Sequence[str] = ()) -> pa.Table | None:
    """Read and concatenate the columns of Parquet files with one value in each row, as text; None if there are none.

    Args:
        files: files with their numbers of rows; None stands for rows without metadata.
        leave_out: columns to skip, the images above all.

    Raises:
        DataError: if a file is gone, damaged, or has another number of rows.
    """
    schemas = [None if path is None else _schema(path) for path, _ in files]
    names = dict.fromkeys(field.name for schema in schemas if schema is not None for field in schema)
    columns = _Columns(", ".join(str(path) for path, _ in files[:3] if path is not None))
    for name in names:
        if name in leave_out or columns.full:
            continue
        parts = [_text_column(path, count, name, schema) for (path, count), schema in zip(files, schemas, strict=True)]
        if all(part is not None for part in parts):
            columns.add(name, pa.chunked_array(parts))
    return columns.table()


class _Columns:
    """Columns up to a total size."""

    def __init__(self, source: str) -> None:
        self.source, self.columns, self.left_out, self.n_bytes = source, dict[str, Any](), list[str](), 0

    @property
    def full(self) -> bool:
        return self.n_bytes > MAX_BYTES

    def add(self, name: str, array: Any) -> None:
        if self.n_bytes + array.nbytes > MAX_BYTES:
            logger.warning("%s: the column %s is too large to be shown or searched", self.source, name)
        else:
            self.columns[name] = array
            self.n_bytes += array.nbytes

    def table(self) -> pa.Table | None:
        return pa.table(self.columns) if self.columns else None


def _read(catalogue: Catalogue, names: Sequence[str]) -> dict[str, Any]:
    """Read columns as text; skip columns that cannot be text, such as lists of numbers."""
    try:
        return catalogue.read([], names)
    except DataError:
        found: dict[str, Any] = {}
        for name in names:
            try:
                found |= catalogue.read([], [name])
            except DataError:
                continue
        return found


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged_file(path, "a Parquet file", error) from None


def _text_column(path: Path | None, count: int, name: str, schema: pa.Schema | None) -> Any:
    """Read a column of one file as text; None if it cannot be text."""
    if path is None or schema is None or name not in schema.names:
        return pa.nulls(count, pa.large_string())
    kind = schema.field(name).type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return None
    try:
        column = pq.read_table(path, columns=[name])[name]
        text = pc.cast(column, pa.large_string()).combine_chunks()
    except pa.ArrowNotImplementedError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise damaged_file(path, "a Parquet file", error) from None
    if len(text) != count:
        raise DataError(f"{path}: expected {count:,} rows, one for each image, found {len(text):,}")
    return text
