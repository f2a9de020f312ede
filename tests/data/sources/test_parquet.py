import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import colours, png

from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def write(
    file: Path,
    values: Sequence[int],
    *,
    paths: Sequence[str | None] | None = None,
    names: list[str] | None = None,
    columns: dict[str, Any] | None = None,
) -> Path:
    """Write a shard with one image of a single colour for each value, in row groups of four."""
    pairs = zip(values, paths or [None] * len(values), strict=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": png(value), "path": path} for value, path in pairs], kind)
    table = pa.table({"image": images} | (columns or {}))
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """30 images in three shards, with row groups of four."""
    for shard in range(3):
        values = range(10 * shard, 10 * shard + 10)
        labels = {"label": pa.array([value % 2 for value in values], pa.int64())}
        paths = [f"p{value}.png" for value in values]
        name = "test-0.parquet" if shard == 2 else f"train-{shard}.parquet"
        write(tmp_path / "data" / name, values, paths=paths, names=["even", "odd"], columns=labels)
    return tmp_path / "data"


def test_ids_classes_holdout_and_pixels(root: Path) -> None:
    source = ParquetSource(str(root), holdout_files=["test-*"])
    order = [*range(20, 30), *range(20)]
    assert source.ids == [f"p{i}.png" for i in order]
    assert source.truth == {f"p{i}.png": ("even", "odd")[i % 2] for i in order}
    assert source.holdout == {f"p{i}.png" for i in range(20, 30)}
    assert colours(source, source.ids) == order


def test_cache_is_bounded_and_each_group_read_once_a_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[Path, int]] = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, *args: Any, **options: Any) -> Any:
        fetched.append((self, options["row_groups"][0]))
        return original(self, *args, **options)

    source = ParquetSource(root, cache_bytes=1000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    ids = [source.ids[i] for i in np.random.default_rng(0).permutation(30)]
    colours(source, ids)
    assert len(fetched) == len(set(fetched)) == 9
    assert 0 < source._cached._total <= 1000
    fetched.clear()
    whole = ParquetSource(root)
    assert colours(whole, ids) == colours(whole, ids)
    assert len(fetched) == 9


def test_opening_reads_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = pq.ParquetFile.read

    def read(self: pq.ParquetFile, columns: list[str], **options: Any) -> pa.Table:
        seen.extend(columns)
        return original(self, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    ParquetSource(root)
    assert set(seen) == {"image.path", "label"}


@pytest.mark.parametrize("paths", [["a", "a"], ["a", None], ["a", ""], None])
def test_ids_fall_back_to_file_and_row(tmp_path: Path, paths: list[str | None] | None) -> None:
    write(tmp_path / "set.parquet", [1, 2], paths=paths)
    source = ParquetSource(tmp_path / "set.parquet")
    assert source.ids == ["set/0000000", "set/0000001"]
    assert source.truth is None


def test_id_column(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet", [1, 2], paths=["x", "y"], columns={"objid": [7, 8], "twice": [1, 1], "gap": [1, None]}
    )
    assert ParquetSource(tmp_path, id_column="objid").ids == ["7", "8"]
    with pytest.raises(DataError, match="id_column twice must be unique, but '1' occurs 2 times"):
        ParquetSource(tmp_path, id_column="twice")
    with pytest.raises(DataError, match="id_column gap is empty in 1 of 2 rows"):
        ParquetSource(tmp_path, id_column="gap")


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(len(png(5))),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct({"bytes": pa.large_binary()}),
    ],
)
def test_binary_columns_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    files: list[Any] = [png(5), png(6), png(7)]
    assert len(set(map(len, files))) == 1
    images = pa.array([{"bytes": file} for file in files] if pa.types.is_struct(kind) else files).cast(kind)
    table = pa.table({"img": images, "label": ["x", "y", "x"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = ParquetSource(tmp_path, image_column="img", channels=1)
    assert source.truth == {"a/0000000": "x", "a/0000001": "y", "a/0000002": "x"}
    assert [image.shape for image in source.read(source.ids)] == [(2, 3, 1)] * 3
    assert colours(source, source.ids) == [5, 6, 7]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (pa.array([1, 0], pa.int64()), ["x", "y"], ["y", "x"]),
        (pa.array([1, 0], pa.int8()), None, ["1", "0"]),
        (pa.array(["s", "t"]).dictionary_encode(), None, ["s", "t"]),
        (pa.array([True, False]), ["x", "y"], ["True", "False"]),
    ],
)
def test_labels_of_every_type(tmp_path: Path, labels: pa.Array, names: list[str] | None, expected: list[str]) -> None:
    write(tmp_path / "a.parquet", [1, 2], names=names, columns={"label": labels})
    truth = ParquetSource(tmp_path).truth
    assert truth is not None
    assert list(truth.values()) == expected
    assert ParquetSource(tmp_path, label_column=None).truth is None


def test_a_list_of_labels_is_no_class(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 2], columns={"label": pa.array([[0], [1, 2]])})
    with pytest.raises(DataError, match=r"expected one class .* column label, found list.*label_column"):
        ParquetSource(tmp_path)
    assert ParquetSource(tmp_path, label_column=None).truth is None


@pytest.mark.parametrize("hidden", [None, -1, 2])
def test_rows_without_a_label_are_refused(tmp_path: Path, hidden: int | None) -> None:
    write(tmp_path / "a.parquet", [1, 2], names=["x", "y"], columns={"label": pa.array([0, hidden], pa.int64())})
    with pytest.raises(DataError, match=r"1 of 2 images have no label, the first is a/0000001; .*label_column"):
        ParquetSource(tmp_path)


def test_broken_metadata_counts_as_none(tmp_path: Path) -> None:
    for number, metadata in enumerate(["{", "[]", '{"info": {"features": {"label": {"names": {}}}}}']):
        file = write(tmp_path / f"{number}.parquet", [1], columns={"label": [3]})
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": metadata}), file)
    assert set((ParquetSource(tmp_path).truth or {}).values()) == {"3"}


def test_damaged_or_missing_shard_rejects_its_images_only(root: Path) -> None:
    source = ParquetSource(root)
    damaged = bytearray((root / "train-0.parquet").read_bytes())
    damaged[4:200] = b"\xff" * 196
    (root / "train-0.parquet").write_bytes(damaged)
    (root / "train-1.parquet").unlink()
    results = source.read(["p0.png", "p10.png", "p20.png", "p9.png"])
    assert [isinstance(result, Reject) for result in results] == [True, True, False, False]
    assert "train-1.parquet cannot be read" in results[1].reason


def test_rows_without_bytes_and_lost_rows_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([png(1), None], pa.binary())}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [1, 2])
    shorter = ParquetSource(tmp_path / "b.parquet")
    assert source.read(["a/0000001"]) == [Reject("a/0000001", "there are no bytes in the image column")]
    write(tmp_path / "b.parquet", [1])
    assert [isinstance(result, Reject) for result in shorter.read(shorter.ids)] == [False, True]


def test_fingerprint_follows_contents_not_times(root: Path, tmp_path: Path) -> None:
    first = ParquetSource(root).fingerprint
    os.utime(root / "train-0.parquet", (0, 0))
    copy = tmp_path / "copy"
    root.rename(copy)
    assert ParquetSource(copy).fingerprint == first
    assert ParquetSource(copy, channels=1).fingerprint != first
    write(copy / "train-0.parquet", range(10), paths=[f"p{i}.png" for i in range(10)], columns={"label": [0] * 10})
    assert ParquetSource(copy).fingerprint != first


def test_messages(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column img, set image_column to one of image, label"):
        ParquetSource(root, image_column="img")
    with pytest.raises(DataError, match=r"expected encoded images.* found int64"):
        ParquetSource(root, image_column="label")
    with pytest.raises(DataError, match="no column kind, set label_column"):
        ParquetSource(root, label_column="kind")


def test_set_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [], columns={"label": pa.array([], pa.int64())})
    with pytest.raises(DataError, match="no images"):
        ParquetSource(tmp_path)
    write(tmp_path / "b.parquet", [1], columns={"label": [1]})
    assert ParquetSource(tmp_path).ids == ["b/0000000"]
