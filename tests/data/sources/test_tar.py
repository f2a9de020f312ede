import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pictures import colours, png, write_tar

from anomalymatch.data.sources import tar
from anomalymatch.data.sources.tar import WebDatasetSource
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.types import Reject


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """30 images in three shards, with classes."""
    for shard in range(3):
        members: dict[str, int | str] = {}
        for value in range(10 * shard, 10 * shard + 10):
            members |= {f"k{value}.png": value, f"k{value}.cls": ("even", "odd")[value % 2], f"k{value}.json": "{}"}
        write_tar(tmp_path / f"data/{shard}.tar", members)
    return tmp_path / "data"


def test_ids_are_keys_in_the_order_of_the_shards(root: Path) -> None:
    source = WebDatasetSource(str(root))
    assert source.ids == [f"k{i}" for i in range(30)]
    assert source.truth == {f"k{i}": ("even", "odd")[i % 2] for i in range(30)}
    assert (source.name, source.labels) == ("data", {})
    order = [29, 0, 13, 13, 7]
    assert colours(source, [f"k{i}" for i in order]) == order
    assert WebDatasetSource(root, channels=1).read(["k12"])[0].tolist() == [[[12]] * 3] * 2


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_other_names(tmp_path: Path, form: int) -> None:
    long = "d" * 80 + "/" + "f" * 90
    if form != tarfile.USTAR_FORMAT:
        long = "é" + long * 3
    file = write_tar(
        tmp_path / "a.tar", {f"{long}.png": 5, "./sub/a.png": 6, ".hidden.png": 7, "__MACOSX/a.png": 8}, form
    )
    source = WebDatasetSource(file)
    assert source.ids == [long, "sub/a"]
    assert colours(source, source.ids) == [5, 6]


def test_image_key(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.left.png": 1, "x.right.png": 2, "y.left.png": 3, "y.right.png": 4})
    with pytest.raises(DataError, match=r"sample 'x' has the images x\.left\.png and x\.right\.png: .*image_key"):
        WebDatasetSource(file)
    assert colours(WebDatasetSource(file, image_key="right.png"), ["x", "y"]) == [2, 4]
    with pytest.raises(DataError, match=r"members that end in \.jpg, found \.left\.png, \.right\.png"):
        WebDatasetSource(file, image_key="jpg")
    assert colours(WebDatasetSource(file, key_end="last_dot"), ["x.left", "y.right"]) == [1, 4]


@pytest.mark.parametrize(
    ("label_key", "content", "expected"),
    [
        ("cls", "3\n", "3"),
        ("txt", " spiral ", "spiral"),
        ("json", '{"label": 4}', "4"),
        ("json.kind", '{"kind": "ring"}', "ring"),
    ],
)
def test_label_keys(tmp_path: Path, label_key: str, content: str, expected: str) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.png": 1, f"x.{label_key.split('.')[0]}": content})
    assert WebDatasetSource(file, label_key=label_key).truth == {"x": expected}
    assert WebDatasetSource(file, label_key=None).truth is None


def test_suffixes_in_capitals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"x.PNG": 1, "x.CLS": "cat", "y.png": 2, "y.cls": "dog", "labels.csv": "filename,label\nx,anomaly\n"}
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", members), image_key="png")
    assert (source.truth, colours(source)) == ({"x": "cat", "y": "dog"}, [1, 2])
    assert "labels.csv in it is not used: put it beside the archive" in caplog.text


def test_missing_labels(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.cls": "1", "x.png": 1, "y.png": 2, "z.json": "[1]", "z.png": 3})
    with pytest.raises(DataError, match=r"2 of 3 images have no label, the first is y; .*label_key"):
        WebDatasetSource(file)
    with pytest.raises(DataError, match="3 of 3 images have no label"):
        WebDatasetSource(file, label_key="txt")
    with pytest.raises(DataError, match=r"with the field 'kind' in z\.json, found '\[1\]'; correct .*label_key"):
        WebDatasetSource(file, label_key="json.kind")


def test_duplicate_keys_name_both_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.png": 1})
    write_tar(tmp_path / "b.tar", {"x.jpg": 1})
    with pytest.raises(DataError, match=r"the key 'x' is in .*a\.tar and in .*b\.tar: every image needs a key"):
        WebDatasetSource(tmp_path)
    (tmp_path / "b.tar").unlink()
    write_tar(tmp_path / "a.tar", {"x.png": 1}, mode="a")
    with pytest.raises(DataError, match=r"x\.png is in it twice"):
        WebDatasetSource(tmp_path)


def test_index_is_cached_until_a_shard_changes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = WebDatasetSource(root, cache_dir=cache)
    follow = tar._follow
    followed: list[str] = []

    def count(file: Path, *rest: Any) -> Any:
        followed.append(file.name)
        return follow(file, *rest)

    monkeypatch.setattr(tar, "_follow", count)
    again = WebDatasetSource(root, cache_dir=str(cache))
    assert (again.ids, again.truth, again.fingerprint) == (first.ids, first.truth, first.fingerprint)
    assert colours(again, ["k17", "k2"]) == [17, 2]
    assert followed == []
    WebDatasetSource(root)
    assert followed == ["0.tar", "1.tar", "2.tar"]
    followed.clear()
    write_tar(root / "1.tar", {"new.png": 77, "new.cls": "odd"})
    changed = WebDatasetSource(root, cache_dir=cache)
    assert followed == ["1.tar"]
    assert colours(changed, ["new", "k20"]) == [77, 20]
    assert changed.fingerprint != first.fingerprint


def test_shard_that_changes_while_open_is_rejected(root: Path) -> None:
    source = WebDatasetSource(root)
    write_tar(root / "0.tar", {"k5.png": 99})
    (root / "1.tar").unlink()
    changed, gone, good = source.read(["k5", "k15", "k25"])
    assert changed == Reject("k5", "0.tar has changed since the set was opened")
    assert gone == Reject("k15", "1.tar cannot be read: No such file or directory")
    assert good[0, 0, 0] == 25


def test_whole_images_of_a_truncated_shard_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", {f"{i}.png": i for i in range(6)})
    whole = file.read_bytes()
    for cut in range(100, len(whole) - 512, 97):
        file.write_bytes(whole[:cut])
        caplog.clear()
        if cut < 512:
            with pytest.raises(DataError, match="expected a tar archive, but it cannot be read"):
                WebDatasetSource(file)
            continue
        source = WebDatasetSource(file)
        results = source.read(source.ids)
        complete = sum(cut >= 1024 * i + 512 + len(png(i)) for i in range(6))
        assert [int(result[0, 0, 0]) for result in results if not isinstance(result, Reject)] == list(range(complete))
        assert len(results) - complete <= 1
        if complete < len(results):
            assert results[-1] == Reject(str(complete), "a.tar breaks off within this image")
        assert "a.tar: " in caplog.text or cut >= 6 * 1024


def test_sample_cut_off_before_its_label_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.png": 1, "x.cls": "1", "y.png": 2, "y.cls": "2"})
    file.write_bytes(file.read_bytes()[: 1024 * 3 + 20])
    source = WebDatasetSource(file)
    assert source.truth == {"x": "1"}
    assert "left out 'y', because the shard breaks off before its label" in caplog.text
    assert WebDatasetSource(file, label_key=None).ids == ["x", "y"]


def test_damaged_header_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", {f"{i}.png": i for i in range(6)})
    data = bytearray(file.read_bytes())
    data[3 * 1024 + 5] ^= 1
    file.write_bytes(data)
    assert WebDatasetSource(file).ids == ["0", "1", "2"]
    assert "the header at byte 3,072 is damaged; 3 images before that can be read" in caplog.text


def test_header_with_a_negative_size_ends_the_search(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"a.png": 1, "b.png": 2, "c.png": 3})
    data = bytearray(file.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    file.write_bytes(data)
    assert WebDatasetSource(file).ids == ["a"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz", "a.tar"])
def test_compressed_archives_are_refused(tmp_path: Path, name: str) -> None:
    file = write_tar(tmp_path / name, {"x.png": 1}, mode="w:xz" if name.endswith("xz") else "w:gz")
    for root in (file, tmp_path):
        with pytest.raises(DataError, match=r"compressed .* unpack it, or pack it again"):
            WebDatasetSource(root)


def test_links_and_odd_names_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.png": 1, "bad\udcff.png": 2})
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert WebDatasetSource(file).ids == ["x"]
    assert "1 names that are not UTF-8, 1 folders, links and sparse files" in caplog.text


def test_long_texts_are_no_labels(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"x.png": 1, "x.txt": "long" * 2**15})
    with pytest.raises(DataError, match="1 of 1 images have no label"):
        WebDatasetSource(file, label_key="txt")


def test_messages(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in it, expected members that end in \.bmp"):
        WebDatasetSource(write_tar(tmp_path / "text.tar", {"a.txt": json.dumps({})}))
    with pytest.raises(ConfigError, match=r"dataset\.source\.key_end is 'x'"):
        WebDatasetSource(root, key_end="x")
    with pytest.raises(ConfigError, match=r"label_key must be null, one of cls, txt, json, or json\.FIELD, got label"):
        WebDatasetSource(root, label_key="label")
