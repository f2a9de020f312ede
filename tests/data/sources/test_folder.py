import contextlib
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from anomalymatch.build_images import build_task
from anomalymatch.checks import trusting
from anomalymatch.config import compose
from anomalymatch.data.find import scan
from anomalymatch.data.source import hash_rows
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import ConfigError, DataError


def add(root: Path, name: str, value: int = 0) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(np.full((4, 5, 3), value, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for value, name in enumerate(["b.png", "a.PNG", "sub/c.tif", "sub/deep/d.JPeG", "sub/é ü.bmp"]):
        add(folder, name, 40 * value)
    return folder


def test_ids_are_sorted_relative_paths_and_only_images(root: Path) -> None:
    add(root, ".hidden.png")
    add(root, ".thumbnails/e.png")
    (root / "notes.txt").write_text("no image")
    (root / "folder.png").mkdir()
    source = FolderSource(root)
    assert source.ids == ["a.PNG", "b.png", "sub/c.tif", "sub/deep/d.JPeG", "sub/é ü.bmp"]
    assert (source.name, source.truth, source.holdout, source.labels) == ("images", None, frozenset(), {})
    assert [image[0, 0].tolist() for image in source.read(["sub/c.tif", "a.PNG"])] == [[80] * 3, [40] * 3]


def test_opening_reads_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(PillowImage, "open", refuse)
    assert len(FolderSource(root)) == 5


def test_links_stay_inside_the_folder(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = add(tmp_path / "outside", "o.png").parent
    (root / "inside.png").symlink_to(root / "b.png")
    (root / "leaves.png").symlink_to(outside / "o.png")
    (root / "sub/up.png").symlink_to("../../outside/o.png")
    (root / "broken.png").symlink_to(root / "none.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "linked").symlink_to(outside, target_is_directory=True)
    (root / "cycle").symlink_to(root, target_is_directory=True)
    source = FolderSource(root)
    assert "inside.png" in source.ids
    assert len(source) == 6
    assert "links that leave the folder: 2" in caplog.text
    assert "links to folders: 2" in caplog.text
    with trusting(True):
        assert {"leaves.png", "sub/up.png"} <= set(FolderSource(root).ids)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/o.png").symlink_to(outside / "o.png")
    with pytest.raises(DataError, match=r"no images in it \(links that leave the folder: 1\)"):
        FolderSource(tmp_path / "in")


def test_a_file_of_gigabytes_is_rejected_unread(root: Path) -> None:
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(6 * 2**30)
    assert FolderSource(root).read(["sparse.jpg"])[0].reason.startswith("it has 6,442,450,944 bytes, which is more")


def test_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert FolderSource(tmp_path / "link").ids == FolderSource(root).ids


def test_names_that_are_not_utf8_are_skipped(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).write_bytes(b"")
    assert len(FolderSource(root)) == 5
    assert "not UTF-8: 1" in caplog.text


def test_sub_folders_are_the_classes(tmp_path: Path) -> None:
    for name in ["cat/1.png", "cat/x/2.png", "dog/1.png"]:
        add(tmp_path, name)
    truth = {"cat/1.png": "cat", "cat/x/2.png": "cat", "dog/1.png": "dog"}
    assert FolderSource(tmp_path).truth == truth
    assert FolderSource(tmp_path, classes="none").truth is None
    (tmp_path / "labels.csv").write_text("filename,label\ncat/1.png,unsure\n")  # by a person
    source = FolderSource(tmp_path)
    assert (source.labels, source.truth) == ({"cat/1.png": "unsure"}, truth)
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "one").mkdir()
    (tmp_path / "cat").rename(tmp_path / "one/cat")
    assert FolderSource(tmp_path / "one").truth is None
    assert set((FolderSource(tmp_path / "one", classes="folders").truth or {}).values()) == {"cat"}
    add(tmp_path, "loose.png")
    assert FolderSource(tmp_path).truth is None
    with pytest.raises(DataError, match=r"1 lie in the folder itself, the first is loose\.png"):
        FolderSource(tmp_path, classes="folders")
    with pytest.raises(ConfigError, match=r"dataset\.source\.classes is 'yes'"):
        FolderSource(tmp_path, classes="yes")
    with pytest.raises(DataError, match="found a file"):
        FolderSource(tmp_path / "loose.png")


@pytest.mark.skipif(os.getuid() == 0, reason="root may list every folder")
def test_folder_that_cannot_be_listed_is_an_error(root: Path) -> None:
    (root / "sub").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot list this folder: Permission denied"):
            FolderSource(root)
    finally:
        (root / "sub").chmod(0o755)


NAMES = st.text(st.sampled_from("a-./0é~"), min_size=1, max_size=8)


@given(names=st.sets(NAMES, min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_scan_sorts_any_names_and_fingerprint_hashes_them(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name in names:
        if all(part and not part.startswith(".") for part in name.split("/")):
            with contextlib.suppress(FileExistsError, NotADirectoryError):  # a folder, and a file of the same name
                path = root / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    expected = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png") if path.is_file())
    entries = scan(root, (".png",)).entries
    assert [entry[0] for entry in entries] == expected
    stats = [(root / id_).stat() for id_ in expected]
    lines = [f"\n{id_}\0{stat.st_size}\0{stat.st_mtime_ns}" for id_, stat in zip(expected, stats, strict=True)]
    assert hash_rows("salt", entries) == hashlib.sha256("".join(["salt", *lines]).encode()).hexdigest()


MVTEC = ["train/good/0.png", "test/good/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png"]


def test_layout_of_mvtec(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in MVTEC:
        add(tmp_path, name)
    assert FolderSource(tmp_path).truth is None
    assert "set dataset=mvtec" in caplog.text
    task = build_task(compose("dataset=mvtec", f"data.root={tmp_path}", "dataset.holdout=0"))
    assert task.source.truth == {"test/crack/0.png": "crack", "test/good/0.png": "good", "train/good/0.png": "good"}
    assert task.anomalies == {"test/crack/0.png"}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train/cat/1.png", "val/dog/2.png"], "folders train, val are splits.*classes=subfolders"),
        (["train2017/1.png", "val2017/2.png", "annotations/instances_val2017.json"], "layout of COCO.*labels_file"),
        (["images/train/1.png", "images/val/2.png", "labels/train/1.txt"], "layout of YOLO.*labels_file"),
        (["train/images/1.png", "test/images/2.png", "train/labels/1.txt"], "layout of YOLO.*labels_file"),
        (["train/1.png", "test/2.png"], "folders test, train are taken for splits.*classes=folders"),
    ],
)
def test_known_layouts_are_named_and_splits_are_no_classes(
    tmp_path: Path, names: list[str], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        if name.endswith(".png"):
            add(tmp_path, name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
    assert FolderSource(tmp_path).truth is None
    assert re.search(sentence, caplog.text)
    if sentence.endswith("subfolders"):
        assert set((FolderSource(tmp_path, classes="subfolders").truth or {}).values()) == {"cat", "dog"}
