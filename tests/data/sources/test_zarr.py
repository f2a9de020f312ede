import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from pictures import colours, stack

from anomalymatch.data.sources.zarr import ZarrSource, _refuse_pickles
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def write(path: Path, images: np.ndarray, version: int = 3, group: bool = True, **options: Any) -> Path:
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    options = {"chunks": (2, *images.shape[1:])} | options
    if group:
        root = zarr.open_group(store, mode="w", zarr_format=version)
        root.create_array("images", data=images, **options)
    else:
        zarr.create_array(store, data=images, zarr_format=version, **options)
    store.close()
    return path


def write_metadata(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "a.zarr", stack(5, 1))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip", "a.zip"])
@pytest.mark.parametrize("group", [True, False])
def test_versions_and_stores(tmp_path: Path, version: int, name: str, group: bool) -> None:
    source = ZarrSource(str(write(tmp_path / name, stack(5, 1), version, group)))
    assert source.ids == [f"a/{i:06d}" for i in range(5)]
    assert colours(source, ["a/000004", "a/000000", "a/000003"]) == [5, 1, 4]
    assert source.read(["a/000002"])[0].tolist() == stack(5, 1)[2].tolist()
    assert (source.name, source.truth, source.channels) == ("zarr", None, 3)
    shards = {"shards": (4, 4, 5, 3)} if version == 3 else {}
    sharded = ZarrSource(write(tmp_path / f"sharded{name[1:]}", stack(9, 1), version, group, **shards))
    assert colours(sharded) == list(range(1, 10))


def test_each_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zarr", stack(8, 1))
    read, decoded = zarr.Array.__getitem__, []

    def counted(self: zarr.Array, rows: Any) -> Any:
        decoded.append((rows.start, rows.stop))
        return read(self, rows)

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    source = ZarrSource(path)
    assert decoded == []
    shuffled = random.Random(0).sample(list(source.ids), 8)
    assert colours(source, shuffled) == [int(id_[-1]) + 1 for id_ in shuffled]
    source.read(source.ids)
    assert decoded == [(0, 2), (2, 4), (4, 6), (6, 8)]


@pytest.mark.parametrize("place", ["a_metadata.parquet", "metadata.parquet", "a.zarr/metadata.parquet"])
def test_metadata_beside_or_inside(store: Path, place: str) -> None:
    write_metadata(store.parent / place, id=list("vwxyz"), filename=list("edcba"), label=list("ppqqp"))
    source = ZarrSource(store)
    assert source.ids == list("edcba")
    assert source.truth == dict(zip("edcba", "ppqqp", strict=True))
    assert colours(source, ["a", "e"]) == [5, 1]
    assert ZarrSource(store, ids="id").ids == list("vwxyz")
    plain = ZarrSource(store, metadata="none")
    assert (plain.ids[0], plain.truth) == ("a/000000", None)
    assert ZarrSource(store, labels="none").truth is None
    assert ZarrSource(store, ids="none").ids[0] == "a/000000"


def test_metadata_file_by_name(store: Path, tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "b.parquet", key=[10, 11, 12, 13, 14], kind=[0, 1, 0, 1, 1])
    source = ZarrSource(store, metadata=path, ids="key", labels="kind", class_names=["x", "y"])
    assert source.truth == {"10": "x", "11": "y", "12": "x", "13": "y", "14": "y"}
    assert ZarrSource(store, metadata=str(path)).ids[0] == "a/000000"
    with pytest.raises(DataError, match="expected a Parquet file with the metadata of"):
        ZarrSource(store, metadata=tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"labels=kind is a column of the metadata, but there is no file a_metadata\."):
        ZarrSource(store, labels="kind")
    write(tmp_path / "b.zarr", stack(2, 1))
    with pytest.raises(DataError, match="is for one store, but there are 2"):
        ZarrSource(tmp_path, metadata=path)


def test_wrong_metadata(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "metadata.parquet"
    write_metadata(path, filename=list("abcd"))
    with pytest.raises(DataError, match=r"expected 5 values in filename, one per image, found the shape \(4,\)"):
        ZarrSource(store)
    write_metadata(path, filename=["a", "b", None, "d", "e"])
    with pytest.raises(DataError, match=r"1 of 5 values in filename are empty; correct it, or set dataset"):
        ZarrSource(store)
    path.write_text("no Parquet")
    with pytest.raises(DataError, match="expected a Parquet file, but it cannot be read"):
        ZarrSource(store)


@pytest.mark.parametrize("group", [True, False])
def test_attributes_name_bands_and_units(tmp_path: Path, group: bool) -> None:
    path = write(tmp_path / "a.zarr", stack(2, 1)[..., :2], group=group)
    assert ZarrSource(path).bands == ("band0", "band1")
    zarr.open(path, mode="r+").attrs.update({"bands": ["g", "i"], "units": "nJy"})
    source = ZarrSource(path)
    assert (source.bands, source.units) == (("g", "i"), "nJy")


@pytest.mark.parametrize("fill", [0, 7, np.nan])
def test_lost_chunks_are_rejected(tmp_path: Path, fill: float) -> None:
    images = stack(5, 1).astype(np.float32) + 10
    path = write(tmp_path / "a.zarr", images, fill_value=fill)
    (path / "images/c/1/0/0/0").unlink()
    source = ZarrSource(path)
    results = source.read(source.ids)
    assert [isinstance(result, Reject) for result in results] == [False, False, True, True, False]
    assert results[3] == Reject("a/000003", f"row 3 of {path} cannot be read: its chunk is missing, or blank")


@pytest.mark.parametrize("version", [2, 3])
def test_cut_blosc_chunks_give_rejects_and_no_wrong_images(tmp_path: Path, version: int) -> None:
    codec = {2: numcodecs.Blosc(), 3: zarr.codecs.BloscCodec()}[version]
    path = write(tmp_path / "a.zarr", stack(5, 1), version, compressors=codec)
    dice = random.Random(version)
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "z"))):
        whole = file.read_bytes()
        for _ in range(6):
            file.write_bytes(whole[: dice.randrange(len(whole))])
            for value, result in enumerate(ZarrSource(path).read(ZarrSource(path).ids), start=1):
                assert isinstance(result, Reject) or (result == value).all()
        file.write_bytes(whole)


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", stack(2, 1), 2)
    header = path / "images/.zarray"
    content = json.loads(header.read_text())
    for change in ({"filters": [{"id": "pickle", "protocol": 5}]}, {"compressor": {"id": "pickle", "protocol": 5}}):
        header.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match="'pickle'"):
            ZarrSource(path)
    array = SimpleNamespace(filters=(), compressors=(numcodecs.Pickle(),))  # as another version may let it pass
    with pytest.raises(DataError, match="packed by pickle, which is not safe to read"):
        _refuse_pickles(path, array)


def test_messages(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no array pixels in this store, found images"):
        ZarrSource(store, images="pixels")
    with pytest.raises(DataError, match=r"in images, found \(2, 4, 5\) and complex128"):
        ZarrSource(write(tmp_path / "b.zarr", np.ones((2, 4, 5), dtype=complex)))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(DataError, match=r'pip install "anomalymatch\[zarr\]"'):
        ZarrSource(store)
