import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import colours, stack

from anomalymatch.data.sources import numpy as numpy_module
from anomalymatch.data.sources.numpy import NumpySource
from anomalymatch.errors import DataError


def write(path: Path, images: np.ndarray, **others: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npz":
        np.savez_compressed(path, images=images, **others)
    else:
        np.save(path, images)
    return path


def test_arrays_beside_the_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", stack(3), filenames=np.array(["x", "y", "z"]), labels=[1, 0, 1], ids=[7, 8, 9])
    source = NumpySource(path)
    assert source.truth == {"x": "1", "y": "0", "z": "1"}
    assert colours(source, ["z", "x"]) == [2, 0]
    assert NumpySource(path, class_names=["p", "q"]).truth == {"x": "q", "y": "p", "z": "q"}
    named = NumpySource(path, ids="ids", labels="none")
    assert (named.ids, named.truth) == (["7", "8", "9"], None)
    assert NumpySource(path, ids="none").ids[0] == "a/000000"


def test_name_of_the_array_with_the_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", stack(2))
    assert colours(NumpySource(tmp_path / "one.npz")) == [0, 1]
    np.savez(tmp_path / "two.npz", cutouts=stack(2), masks=stack(2, 7))
    assert colours(NumpySource(tmp_path / "two.npz", images="masks")) == [7, 8]
    with pytest.raises(DataError, match="there is no array images, found cutouts, masks"):
        NumpySource(tmp_path / "two.npz")


def test_one_image_in_each_file(tmp_path: Path) -> None:
    for name, value in (("b", 1), ("sub/a", 2), ("sub/b", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.npy", np.full((4, 5 + value, 2), value, dtype=np.int16))
    source = NumpySource(tmp_path, each=True, bands=["g", "i"])
    assert source.ids == ["b.npy", "sub/a.npy", "sub/b.npy"]
    assert [source.load(i).shape for i in range(3)] == [(4, 6, 2), (4, 7, 2), (4, 8, 2)]
    assert [int(source.load(i)[0, 0, 0]) for i in range(3)] == [1, 2, 3]
    assert source.bands == ("g", "i")
    write(tmp_path / "b.npy", np.full((4, 5), 9, dtype=np.int16))
    assert NumpySource(tmp_path / "b.npy", each=True).load(0).tolist() == [[[9]] * 5] * 4
    write(tmp_path / "c.npz", stack(1))
    with pytest.raises(DataError, match=r"c\.npz: dataset\.source\.each=true is for \.npy files"):
        NumpySource(tmp_path, each=True)


@pytest.mark.parametrize("shape", [(20, 27), (20, 27, 3), (20, 27, 5)])
def test_one_image_is_told_from_a_stack(
    tmp_path: Path, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    image = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    for name in "abcd":
        write(tmp_path / f"in/{name}.npy", image)
    source = NumpySource(tmp_path / "in")
    assert source.ids == ["a.npy", "b.npy", "c.npy", "d.npy"]
    assert source.load(2).tolist() == image.reshape(20, 27, -1).tolist()
    assert "and 3 other files are taken as one image each" in caplog.text
    packed = NumpySource(write(tmp_path / "e.npz", image))
    assert (packed.ids, packed.load(0).tolist()) == (["e/000000"], image.reshape(20, 27, -1).tolist())
    if len(shape) == 3:
        assert len(NumpySource(tmp_path / "in", layout="nhw")) == 80
        with pytest.raises(DataError, match="layout=nhw"):
            NumpySource(tmp_path / "in", each=False)


def test_packed_arrays_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.npz", stack(3))
    read, unpacked = np.lib.format.read_array, []
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **kw: unpacked.append(1) or read(*args, **kw))
    for cache_bytes, reads in ((2**20, 2), (1, 4)):
        source = NumpySource(tmp_path, cache_bytes=cache_bytes)
        assert unpacked == []
        for _ in range(2):
            assert colours(source, list(reversed(source.ids))) == [2, 1, 0, 2, 1, 0]
        assert len(unpacked) == reads
        unpacked.clear()


def test_files_cut_short_or_replaced_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", stack(8))
    source, other = NumpySource(path), NumpySource(path)
    source.read(source.ids[:1])
    path.write_bytes(path.read_bytes()[:200])
    assert "the file has been cut short" in source.read(source.ids[-1:])[0].reason
    assert "has changed since the set was opened" in other.read(other.ids[-1:])[0].reason


def test_a_packed_array_beyond_the_memory_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.npz", np.zeros((2**12, 64, 64), dtype=np.uint8))
    assert len(NumpySource(path)) == 2**12
    monkeypatch.setattr(numpy_module, "_memory", lambda: 2**24)
    with pytest.raises(DataError, match=r"unpacks to 16,777,344 bytes, but at most 8,388,608 fit"):
        NumpySource(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 4, 4), None), allow_pickle=True)
    with pytest.raises(DataError, match="get it again"):
        NumpySource(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", images=stack(2), filenames=np.array(["x", "y"], dtype=object))
    with pytest.raises(DataError, match="Object arrays cannot be loaded when allow_pickle=False"):
        NumpySource(tmp_path / "b.npz")
    assert colours(NumpySource(tmp_path / "b.npz", ids="none")) == [0, 1]


def test_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", stack(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="expected 248 bytes in it by its header, found 247; get it again"):
        NumpySource(path)
    with pytest.warns(UserWarning, match="format 3.0"):
        np.save(tmp_path / "table.npy", np.zeros(2, dtype=[("λ", "i4")]))
    with pytest.raises(DataError, match="is for tables, which are no images"):
        NumpySource(tmp_path / "table.npy")
    with zipfile.ZipFile(write(tmp_path / "b.npz", stack(2)), "w") as archive:
        archive.writestr("images.npy", path.read_bytes())
    with pytest.raises(DataError, match="expected 248 bytes in images by its header, found 247"):
        NumpySource(tmp_path / "b.npz")
