import errno
import json
import logging
import multiprocessing
import threading
import time

import numpy as np
import pytest

from anomalymatch.cache import Blocks, Cache, cache_key
from anomalymatch.errors import StorageError

ROWS = np.arange(12, dtype=np.float16).reshape(4, 3)
INFO = {"ids": ["a", "ü\udcff"], "rejects": [["b", "the file is truncated"]]}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "deep" / "cache")


class Counted:
    """A computation that counts how often it ran."""

    def __init__(self, arrays=None, info=None):
        self.arrays, self.info, self.count = arrays or {"rows": ROWS}, info or INFO, 0

    def __call__(self):
        self.count += 1
        return self.arrays, self.info


def test_an_entry_is_computed_once_and_comes_back_the_same(cache):
    compute = Counted({"rows": ROWS, "flags": np.array([True, False]), "scalar": np.array(2.5)})
    for _ in range(2):
        entry = cache.get("first", compute)
        assert entry.info == INFO
        assert set(entry.arrays) == {"rows", "flags", "scalar"}
        for name, array in compute.arrays.items():
            np.testing.assert_array_equal(entry.arrays[name], array, strict=True)
    assert compute.count == 1
    assert isinstance(entry.arrays["rows"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        entry.arrays["rows"][0] = 1
    assert Cache(cache.folder).get("first", compute).info == INFO
    assert cache.get("second", compute).info == INFO
    assert compute.count == 2


@pytest.mark.parametrize("array", [np.empty((0, 5), np.float32), ROWS.T, ROWS[::2, ::2]])
def test_any_layout_in_memory(cache, array):
    np.testing.assert_array_equal(cache.write("x", {"rows": array}, {}).arrays["rows"], array, strict=True)


def test_blocks_are_written_one_by_one(cache):
    asked = []

    def blocks():
        for start in range(0, 4, 2):
            asked.append(start)
            yield ROWS[start : start + 2]

    entry = cache.write("x", {"rows": Blocks((np.int64(4), 3), "float16", blocks())}, {})
    np.testing.assert_array_equal(entry.arrays["rows"], ROWS, strict=True)
    assert asked == [0, 2]
    assert entry.arrays["rows"].tolist() == cache.read("x").arrays["rows"].tolist()


def test_too_few_blocks_leave_the_old_entry(cache):
    cache.write("x", {"rows": ROWS}, {})
    with pytest.raises(ValueError, match=r"12 .*6"):
        cache.write("x", {"rows": Blocks((4, 3), "float16", [ROWS[:2]])}, {})
    assert cache.read("x").arrays["rows"].shape == (4, 3)
    assert [path.name for path in cache.folder.iterdir()] == ["x"]


def test_nothing_is_pickled(cache):
    with pytest.raises(TypeError, match="rows"):
        cache.write("x", {"rows": np.array([{}, None])}, {})
    with pytest.raises(TypeError):
        cache.write("x", {}, {"array": ROWS})
    assert cache.read("x") is None


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rows.npy", lambda data: data[:-3]),
        ("rows.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("info.json", lambda data: data.replace(b"truncated", b"damaged")),
        ("checksums.json", lambda data: b'["rows.npy"]'),
        ("checksums.json", lambda data: json.dumps({"rows.npy": json.loads(data)["rows.npy"]}).encode()),
        ("rows.npy", None),
        ("checksums.json", None),
    ],
    ids=["truncated", "one bit", "info", "checksums", "info without checksum", "lost", "no checksums"],
)
def test_damage_is_logged_once_and_computed_again(cache, file, damage, caplog):
    compute = Counted()
    cache.get("x", compute)
    path = cache.folder / "x" / file
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        entry = cache.get("x", compute)
        cache.get("x", compute)
    np.testing.assert_array_equal(entry.arrays["rows"], ROWS, strict=True)
    assert compute.count == 2
    (record,) = caplog.records
    assert str(cache.folder / "x") in record.getMessage()


def test_several_entries_under_one_lock_resume(cache):
    done = []
    with cache.locked():
        for name in ("0", "1"):
            cache.get(name, Counted())  # takes the lock again
    with cache.locked():
        for name in ("0", "1", "2"):
            if cache.read(name) is None:
                cache.write(name, *Counted()())
                done.append(name)
    assert done == ["2"]


def test_an_error_in_the_computation_stays_what_it_is_and_frees_the_lock(cache):
    def fail():
        raise PermissionError(errno.EACCES, "the image cannot be read")

    with pytest.raises(PermissionError):
        cache.get("x", fail)
    assert cache.get("x", Counted()).info == INFO


def _compute_slowly(folder, log):
    def compute():
        with open(log, "a") as file:
            file.write("computed\n")
        time.sleep(0.3)
        return {"rows": ROWS}, INFO

    assert Cache(folder).get("x", compute).arrays["rows"].shape == (4, 3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["thread", "fork"])
def test_others_wait_for_the_one_that_computes(tmp_path, kind):
    if kind not in ("thread", *multiprocessing.get_all_start_methods()):
        pytest.skip("this system has no forks")
    worker = threading.Thread if kind == "thread" else multiprocessing.get_context(kind).Process
    log = tmp_path / "log"
    workers = [worker(target=_compute_slowly, args=(tmp_path / "c", log)) for _ in range(3)]
    for started in workers:
        started.start()
    for started in workers:
        started.join(60)
        assert not started.is_alive()
    assert log.read_text() == "computed\n"


def test_a_full_disk_says_so(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("anomalymatch.cache._write_array", full)
    with pytest.raises(StorageError, match="disk is full"):
        cache.get("x", Counted())
    assert cache.read("x") is None


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        Cache(tmp_path / "file").get("x", Counted())


def test_the_key_follows_everything_but_the_order():
    base = {"source": "abc", "size": 64, "levels": [1, 2], "prior": None, "sample": ROWS}
    key = cache_key(base)
    assert key == cache_key(dict(reversed(base.items())))
    assert key == cache_key({**base, "sample": np.asfortranarray(ROWS)})
    changes = [
        {"source": "abd"},
        {"size": 65},
        {"size": "64"},
        {"levels": [2, 1]},
        {"prior": 0},
        {"sample": ROWS + 1},
        {"sample": ROWS.reshape(3, 4)},
        {"sample": ROWS.view(np.int16)},
        {"more": 1},
    ]
    keys = {key, *(cache_key(base | change) for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert key.isalnum()
    with pytest.raises(TypeError, match="set"):
        cache_key({"bad": {1, 2}})
