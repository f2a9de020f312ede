import numpy as np
from astropy import units
from astropy.table import Table

from anomalymatch.votable import write_votable

COLUMNS = {"id": str, "ra": float, "dec": float, "score": float, "rank": int, "separation": float}
ROWS = [
    ("a/ü.fits", 10.5, -3.25, 0.75, 1, 0.5),
    ("b\x00c\ud800", np.float64(359.9), 89.0, None, None, None),
    (None, 0.0, 0.0, np.float32(0.5), np.int64(3), None),
]


def read(path):
    return Table.read(path, format="votable")


def test_cells_units_and_missing_values(tmp_path):
    write_votable(tmp_path / "new" / "top.vot", COLUMNS, ROWS)
    table = read(tmp_path / "new" / "top.vot")
    assert table.colnames == list(COLUMNS)
    assert table["id"].tolist() == ["a/ü.fits", "b?c?", ""]
    assert table["ra"].tolist() == [10.5, 359.9, 0.0]
    assert table["score"].tolist() == [0.75, None, 0.5]
    assert table["rank"].tolist() == [1, None, 3]
    assert table["rank"].dtype == np.int64
    assert table["separation"].tolist() == [0.5, None, None]
    assert [table[name].unit for name in ("ra", "dec", "separation")] == [units.deg, units.deg, units.arcsec]
    assert table["score"].unit is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["top.vot"]


def test_no_rows_and_nothing_but_missing_values(tmp_path):
    write_votable(tmp_path / "a.vot", COLUMNS, [])
    assert len(read(tmp_path / "a.vot")) == 0
    write_votable(tmp_path / "a.vot", {"rank": int, "name": str}, [(None, None)])
    table = read(tmp_path / "a.vot")
    assert (table["rank"].tolist(), table["name"].tolist()) == ([None], [""])
