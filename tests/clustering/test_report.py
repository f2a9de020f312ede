import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anomalymatch.clustering.report import label_groups, read_names, write_groups
from anomalymatch.data.label_log import import_csv
from anomalymatch.errors import LabelError, StorageError


@pytest.fixture
def groups(tmp_path):
    columns = {"id": ["a", "b", "c", "d"], "cluster": np.array([0, 1, 0, 2])}
    pq.write_table(pa.table(columns), tmp_path / "clusters.parquet")
    write_groups(tmp_path / "groups.csv", [2, 1, 1], ["a", "b", "d"])
    return tmp_path / "groups.csv"


def test_names_are_empty_at_first(groups):
    assert groups.read_text().splitlines()[:2] == ["cluster,name,size,medoid", "0,,2,a"]
    assert read_names(groups) == {}
    with pytest.raises(LabelError, match="no group has a name yet"):
        label_groups(groups)


def test_names_become_labels(groups):
    groups.write_text("cluster,name\n0,satellite trail\n2,Normal\n1,\n")
    path = label_groups(groups)
    assert path.read_text().splitlines() == [
        "filename,label,group",
        "a,anomaly,satellite trail",
        "c,anomaly,satellite trail",
        "d,normal,Normal",
    ]
    assert import_csv(path, {"a", "b", "c", "d"}) == {"a": "anomaly", "c": "anomaly", "d": "normal"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group,name\n0,x\n", "must have the columns cluster,name"),
        ("cluster,name\nx,ring\n", "line 2: 'x' is not the number"),
        ("cluster,name\n0,ring\n0,arc\n", "line 3: '0' is not the number"),
        ("cluster,name\n9,ring\n", "there is no group 9"),
        ("\udcff", "cannot be read"),
    ],
)
def test_invalid_files_are_refused(groups, text, message):
    groups.write_text(text, errors="surrogateescape")
    with pytest.raises(LabelError, match=message):
        label_groups(groups)


def test_missing_or_corrupt_groups(groups, tmp_path):
    groups.write_text("cluster,name\n0,ring\n")
    (tmp_path / "clusters.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="missing or corrupt"):
        label_groups(groups)
