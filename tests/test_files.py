import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomalymatch.errors import StorageError
from anomalymatch.files import atomic_file, atomic_folder, make_folder, remove_leftovers, storage_errors, write_text


def content(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write(temporary, text):
    """Write the text to the file, or to the file `w` of the folder."""
    (temporary / "w" if temporary.is_dir() else temporary).write_text(text)


def fail_halfway(writer, path):
    with writer(path) as temporary:
        write(temporary, "half")
        raise KeyError("stop")


def test_atomic_file_appears_and_is_replaced_when_complete(tmp_path):
    path = tmp_path / "new" / "scores.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
        assert temporary.parent == path.parent  # so that the rename stays on one file system
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert content(tmp_path) == ["new", "new/scores.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch, kind):
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(os.fstat(handle).st_ino) or fsync(handle))
    if kind == "file":
        write_text(tmp_path / "a", "x")
    else:
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "b").write_text("y")
        assert {(tmp_path / name).stat().st_ino for name in ("f", "f/deep", "f/deep/b")} <= set(calls[:-2])
    assert calls[-2:] == ["rename", tmp_path.stat().st_ino]


UNFINISHED = """
import sys, time
from pathlib import Path
from anomalymatch.files import atomic_file, atomic_folder
with atomic_file(Path(sys.argv[1]) / "a.csv"), atomic_folder(Path(sys.argv[1]) / "01") as folder:
    (folder / "w").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", UNFINISHED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        remove_leftovers(tmp_path)
        assert len(content(tmp_path)) == 3, "the process lives"
        process.kill()
    (tmp_path / ".download.part").touch()  # not written by these functions
    with atomic_file(tmp_path / "b"):
        remove_leftovers(tmp_path)
    assert content(tmp_path) == [".download.part", "b"]
    remove_leftovers(tmp_path / "nothing")


def test_files_are_utf_8_and_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "Äpfel 银河\n")
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "b").write_text("y")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == "Äpfel 银河\n".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o750


def test_atomic_folder(tmp_path):
    path = tmp_path / "cycle"
    with atomic_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "w").write_text("1")
        assert not path.exists()
    assert content(tmp_path) == ["cycle", "cycle/deep", "cycle/deep/w"]
    with atomic_folder(path) as temporary:
        (temporary / "v").write_text("2")
        assert (path / "deep" / "w").exists()
    assert content(tmp_path) == ["cycle", "cycle/v"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_an_error_leaves_the_old_state(tmp_path, writer):
    with pytest.raises(KeyError):
        fail_halfway(writer, tmp_path / "new")
    assert content(tmp_path) == []
    write_text(tmp_path / "old" if writer is atomic_file else tmp_path / "old" / "w", "old")
    before = content(tmp_path)
    with pytest.raises(KeyError):
        fail_halfway(writer, tmp_path / "old")
    assert content(tmp_path) == before


KILLED = """
import sys, time
from pathlib import Path
from anomalymatch.files import atomic_file, atomic_folder
with {kind}(Path(sys.argv[1])) as temporary:
    target = temporary / "w" if temporary.is_dir() else temporary
    target.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
@pytest.mark.parametrize("old", [True, False])
def test_kill_leaves_no_partial_file(tmp_path, kind, old):
    path = tmp_path / "target"
    writer = {"atomic_file": atomic_file, "atomic_folder": atomic_folder}[kind]
    if old:
        with writer(path) as temporary:
            write(temporary, "old")
    command = [sys.executable, "-c", KILLED.format(kind=kind), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    file = path if kind == "atomic_file" else path / "w"
    assert (file.read_text() == "old") if old else not path.exists()
    # Leftovers are hidden, and do not disturb the next attempt.
    assert all(name.startswith(".target.") for name in content(tmp_path) if not name.startswith("target"))
    with writer(path) as temporary:
        write(temporary, "new")
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "read-only: choose another folder"),
        (errno.EACCES, "permission denied"),
    ],
)
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_operating_system_errors(tmp_path, monkeypatch, number, sentence, writer):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with (
        pytest.raises(StorageError, match=rf"^cannot write .*target: .*{sentence}"),
        writer(tmp_path / "target") as temporary,
    ):
        write(temporary, "x")
    assert content(tmp_path) == []


def test_file_size_limit(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match="larger than the operating system allows"):
            write_text(tmp_path / "a", "x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == []


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "deeper", "x")


def test_other_errors_pass_through():
    with pytest.raises(FileNotFoundError), storage_errors(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(ZeroDivisionError), storage_errors(Path("x")):
        1 / 0  # noqa: B018


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a"
    code = (
        "import sys; from pathlib import Path; from anomalymatch.files import write_text\n"
        "for _ in range(200): write_text(Path(sys.argv[1]), sys.argv[2] * 20_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "xy"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 20_000
            seen |= set(text)
            assert len(set(text)) == 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen
    assert seen <= {"x", "y"}
