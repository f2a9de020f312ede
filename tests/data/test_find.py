import pytest

from anomalymatch.checks import trusting
from anomalymatch.data.find import find_files, walk
from anomalymatch.errors import DataError


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def is_tar(path):
    return path.name.lower().endswith(".tar")


def is_store(path):
    return path.suffix == ".zarr" or (path / "zarr.json").is_file()


def found(root, wanted=is_tar, **options):
    return [(file.stem, file.relative) for file in find_files(root, wanted, "a tar shard", **options)]


def test_files_at_any_depth_in_the_order_of_their_paths(tmp_path):
    make(tmp_path, "b.tar", "a/z.TAR", "a.tar", "a-b/y.tar", "a/notes.txt")
    assert found(tmp_path) == [("z", "a/z.TAR"), ("y", "a-b/y.tar"), ("a", "a.tar"), ("b", "b.tar")]
    assert find_files(tmp_path, is_tar, "a tar shard")[0].path == tmp_path / "a" / "z.TAR"


def test_hidden_files_dead_links_and_links_to_folders_are_left_out(tmp_path):
    root = make(tmp_path / "set", "a.tar", ".b.tar", ".hidden/c.tar")
    other = make(tmp_path / "other", "d.tar")
    (root / "link.tar").symlink_to(other / "d.tar")
    (root / "dead.tar").symlink_to(other / "no.tar")
    (root / "folder").symlink_to(other)
    with pytest.raises(DataError, match=r"link\.tar: it is a link out of the folder.* trust=true"):
        found(root)
    with trusting(True):
        assert found(root) == [("a", "a.tar"), ("link", "link.tar")]


def test_a_folder_can_be_a_file(tmp_path):
    make(tmp_path, "x/one.zarr/zarr.json", "x/one.zarr/inner.zarr/zarr.json", "two/zarr.json", "two/c/0")
    assert found(tmp_path, is_store, folders=True) == [("two", "two"), ("one", "x/one.zarr")]
    assert found(tmp_path / "two", is_store, folders=True) == [("two", "two")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.zarr").symlink_to(tmp_path / "x" / "one.zarr")
    with trusting(True):
        assert found(tmp_path / "set", is_store, folders=True) == [("link", "link.zarr")]


def test_equal_names_are_told_apart_by_their_folders(tmp_path):
    make(tmp_path, "a/x.tar", "b/x.tar")
    assert found(tmp_path) == [("a/x", "a/x.tar"), ("b/x", "b/x.tar")]
    with pytest.raises(DataError, match=r"x\.tar"):
        found([tmp_path / "a", tmp_path / "b"])


def test_several_roots_in_their_order(tmp_path):
    make(tmp_path, "b/y.tar", "a/x.tar", "z.tar")
    assert found([tmp_path / "z.tar", str(tmp_path / "b"), tmp_path / "a"]) == [
        ("z", "z.tar"),
        ("y", "y.tar"),
        ("x", "x.tar"),
    ]


@pytest.mark.parametrize("name", ["set.zarr.zip", "set.zip"])
def test_the_stem_of_a_zipped_store(tmp_path, name):
    make(tmp_path, name)
    assert found(tmp_path, lambda path: path.suffix == ".zip") == [("set", name)]


def test_folders_with_the_name_of_a_file_are_searched(tmp_path):
    make(tmp_path, "a.tar/b.tar")
    (tmp_path / "link.tar").symlink_to(tmp_path / "a.tar")
    assert found(tmp_path) == [("b", "a.tar/b.tar")]
    assert found(tmp_path / "a.tar") == [("b", "b.tar")]


def test_nothing_is_found(tmp_path):
    with pytest.raises(DataError, match="a tar shard"):
        found(tmp_path)
    for options in ({}, {"folders": True}):
        with pytest.raises(DataError, match="missing"):
            found(tmp_path / "missing.tar", **options)
    with pytest.raises(DataError, match="empty"):
        found([])


def test_walk_lists_folders_that_are_not_taken_away(tmp_path):
    make(tmp_path, "b/c/x", "a/y", ".h/z", "e/.k/w", "f.txt", ".g")
    seen = []
    for folder in walk(tmp_path):
        seen.append((folder.path, [child.name for child in folder.files]))
        folder.folders[:] = [name for name in folder.folders if name != "a"]
    assert seen == [("", [".g", "f.txt"]), ("b/", []), ("b/c/", ["x"]), ("e/", [])]
    with pytest.raises(DataError, match="missing"):
        list(walk(tmp_path / "missing"))
