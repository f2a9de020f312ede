import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import colours, png, write_zip

from anomalymatch.data.sources.zip import ZipSource
from anomalymatch.errors import ConfigError, DataError, LabelError
from anomalymatch.types import Reject


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    members = {"b.png": 1, "a.PNG": 2, "sub/é ü.png": 3, "notes.txt": "text", ".hidden.png": 4, "folder.png/": b""}
    return write_zip(tmp_path / "set.zip", members | {"__MACOSX/b.png": b"x", "sub/.thumbs/c.png": 5})


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ids_are_paths_inside_and_pixels_are_right(tmp_path: Path, method: int) -> None:
    file = write_zip(tmp_path / "a.zip", {"x/b.png": 1, "x/a.png": 2}, method)
    source = ZipSource(str(file))
    assert (source.ids, source.name, source.truth, source.labels) == (["x/a.png", "x/b.png"], "a", None, {})
    assert source.read(["x/b.png"])[0].tolist() == np.full((2, 3, 3), 1).tolist()
    assert colours(source, ["x/b.png", "x/a.png", "x/b.png"]) == [1, 2, 1]


def test_hidden_entries_and_other_files_are_skipped(archive: Path) -> None:
    assert ZipSource(archive).ids == ["a.PNG", "b.png", "sub/é ü.png"]


def test_first_folder_is_the_class(tmp_path: Path) -> None:
    write_zip(tmp_path / "in/b.zip", {"cat/x.png": 1})
    write_zip(tmp_path / "in/a.zip", {"cat/x.png": 2, "dog/x.png": 3})
    truth = {"a/cat/x.png": "cat", "a/dog/x.png": "dog", "b/cat/x.png": "cat"}
    assert ZipSource(tmp_path / "in").truth == truth
    assert ZipSource(tmp_path / "in", classes="none").truth is None
    assert ZipSource(tmp_path / "in/b.zip").truth is None
    assert ZipSource(tmp_path / "in/b.zip", classes="folders").truth == {"cat/x.png": "cat"}


def test_labels_inside(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"x.png": 1, "y.png": 2, "labels.csv": "filename,label\nx.png,anomaly\n"})
    (tmp_path / "labels.csv").write_text("filename,label\nx.png,normal\n")
    assert ZipSource(file).labels == {"x.png": "anomaly"}
    assert ZipSource(file, labels_file=tmp_path / "labels.csv").labels == {"x.png": "normal"}
    other = write_zip(tmp_path / "in/b.zip", {"x.png": 1, "labels.csv": "filename,label\nx.png,cat\n"})
    assert ZipSource(other).truth == {"x.png": "cat"}
    write_zip(tmp_path / "in/c.zip", {"x.png": 1, "labels.csv": "filename,label\nx.png,dog\n"})
    assert ZipSource(tmp_path / "in").truth == {"b/x.png": "cat", "c/x.png": "dog"}
    write_zip(tmp_path / "in/d.zip", {"x.png": 1})
    wrong = write_zip(tmp_path / "wrong.zip", {"x.png": 1, "labels.csv": "filename,label\nz.png,cat\n"})
    with pytest.raises(LabelError, match=r"labels\.csv in .*wrong\.zip: 1 of its lines cannot be used.*'z\.png,cat'"):
        ZipSource(wrong)
    with pytest.raises(
        LabelError, match=r"labels\.csv in .*in: .*b/x\.png .* unknown label 'cat'.* 1 of 3 are missing, .*d/x\.png"
    ):
        ZipSource(tmp_path / "in")


def test_fingerprint_does_not_depend_on_the_place(archive: Path, tmp_path: Path) -> None:
    first = ZipSource(archive).fingerprint
    assert ZipSource(archive.rename(tmp_path / "other.zip")).fingerprint == first


def test_archive_of_a_folder(tmp_path: Path) -> None:
    members = {"photos/cat/x.png": 1, "photos/dog/y.png": 2, "__MACOSX/photos/labels.csv": "x"}
    labels = "filename,label\ncat/x.png,Anomaly\nphotos/dog/y.png,normal\n"
    source = ZipSource(write_zip(tmp_path / "a.zip", members | {"photos/labels.csv": labels}))
    assert source.labels == {"photos/cat/x.png": "anomaly", "photos/dog/y.png": "normal"}
    assert source.truth == {"photos/cat/x.png": "cat", "photos/dog/y.png": "dog"}


def test_backslashes_are_folders(tmp_path: Path) -> None:
    members = {"cat\\x.png": 1, "dog\\y.png": 2, "labels.csv": "filename,label\ncat/x.png,anomaly\n"}
    source = ZipSource(write_zip(tmp_path / "a.zip", members))
    assert source.truth == {"cat/x.png": "cat", "dog/y.png": "dog"}
    assert (source.labels, colours(source)) == ({"cat/x.png": "anomaly"}, [1, 2])


def test_bad_members_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["crc.png", "secret.png", "big.png", "liar.png", "good.png", "text.png"]
    file = write_zip(tmp_path / "a.zip", dict.fromkeys(names[:5], 7) | {"text.png": "no image"}, zipfile.ZIP_STORED)
    data = bytearray(file.read_bytes())
    data[data.index(b"crc.png") + 40] ^= 1
    for name, field, value in [("secret.png", 8, 1), ("big.png", 24, 2**31), ("liar.png", 24, 9)]:
        start = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
        struct.pack_into("<H" if field == 8 else "<I", data, start + field, value)
    file.write_bytes(data)
    results = ZipSource(file).read(names)
    reasons = [result.reason if isinstance(result, Reject) else "" for result in results]
    assert "Bad CRC-32" in reasons[0]
    assert reasons[1] == "it is encrypted: unpack the archive with its password"
    assert reasons[2] == "it has 2,147,483,648 bytes, which is more than 268,435,456"
    assert "Bad CRC-32" in reasons[3]
    assert reasons[4] == ""
    assert "not an image" in reasons[5]


def test_decompression_stops_at_the_claimed_size(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"bomb.png": bytes(10**8)})
    data = bytearray(file.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\1\2") + 24, 100)
    file.write_bytes(data)
    import tracemalloc

    source = ZipSource(file)
    tracemalloc.start()
    result = source.read(["bomb.png"])[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(result, Reject)
    assert peak < 10**7


def test_messages(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in it, expected members that end in \.bmp"):
        ZipSource(write_zip(tmp_path / "text.zip", {"a.txt": "text"}))
    with pytest.raises(ConfigError, match=r"dataset\.source\.classes is 'yes'"):
        ZipSource(archive, classes="yes")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("b.png", png(9))
    with pytest.raises(DataError, match=r"'b\.png' occurs more than once"):
        ZipSource(archive)
