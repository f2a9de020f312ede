import multiprocessing
import pickle
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest

from anomalymatch.lru import LRU


class Opened:
    """A stand-in for an open file: knows its key and whether it was closed."""

    count = 0

    def __init__(self, key):
        if key == "missing":
            raise FileNotFoundError("there is no such file")
        Opened.count += 1
        self.key, self.closed = key, False

    def close(self):
        assert not self.closed, "closed twice"
        self.closed = True


@pytest.fixture(autouse=True)
def from_zero():
    Opened.count = 0


def files(limit=64):
    return LRU(limit, close=Opened.close)


def use(cache, key):
    return cache.use(key, partial(Opened, key))


def test_a_value_is_made_once():
    cache = files()
    with use(cache, "a") as first:
        assert first.key == "a"
    with use(cache, "a") as second:
        assert second is first
    assert cache.get("a", lambda: Opened("a")) is first
    assert cache.find("a") is first
    assert cache.find("b") is None
    assert Opened.count == len(cache) == 1


def get(cache, key):
    return nullcontext(cache.get(key, partial(Opened, key)))


@pytest.mark.parametrize("way", [use, get])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_twin(limit, way):
    """Against a list of the latest keys."""
    cache, latest = files(limit), []
    for step in range(300):
        key = (step * step // 7) % 11
        before = Opened.count
        with way(cache, key) as opened:
            assert (opened.key, opened.closed) == (key, False)
        assert Opened.count - before == (key not in latest)
        latest = [*[k for k in latest if k != key], key][-limit:]
    assert len(cache) == limit


def test_the_limit_can_be_a_cost():
    cache = LRU(10, cost=len)
    for key, size in (("a", 4), ("b", 4), ("c", 2)):
        cache.put(key, b"x" * size)
    assert len(cache) == 3
    cache.put("d", b"x")
    assert cache.find("a") is None
    cache.put("b", b"x" * 8)  # in place of the shorter one
    assert [key for key in "bcd" if cache.find(key)] == ["b", "d"]
    cache.put("e", b"x" * 50)  # alone it is too much, but the newest stays
    assert [key for key in "bcde" if cache.find(key)] == ["e"]
    cache.put("f", b"x")
    assert [key for key in "ef" if cache.find(key)] == ["f"]


def test_a_value_in_use_further_out_stays_open():
    cache = files(1)
    with use(cache, "a") as outer:
        with use(cache, "b") as inner, use(cache, "a") as same:
            assert same is outer
            assert not inner.closed
        assert not outer.closed
    with use(cache, "c"):
        assert outer.closed
        assert inner.closed


def test_a_replaced_value_is_closed():
    cache, first, second = files(), Opened("a"), Opened("a")
    cache.put("a", first)
    cache.put("a", second)
    assert (first.closed, second.closed) == (True, False)


def test_a_value_that_cannot_be_made_is_tried_again():
    cache = files(1)
    for _ in range(2):
        with pytest.raises(FileNotFoundError), use(cache, "missing"):
            pass
    with use(cache, "a") as opened:
        assert not opened.closed


def test_an_error_inside_of_the_block_frees_the_value():
    cache = files(1)
    with pytest.raises(ValueError, match="bad pixels"), use(cache, "a") as opened:
        raise ValueError("bad pixels")
    in_threads(1, lambda seed: use(cache, "b").__enter__())
    assert opened.closed


def in_threads(count, work):
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_use_is_for_one_thread_at_a_time():
    cache, inside, most = files(2), [0], [0]

    def work(seed):
        for step in range(20):
            with use(cache, (seed * step) % 5) as opened:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(1e-5)
                assert not opened.closed
                inside[0] -= 1

    in_threads(8, work)
    assert most == [1]


def test_get_makes_values_side_by_side():
    cache, both = LRU(10), threading.Barrier(2, timeout=30)

    def make():
        both.wait()  # would break if the second thread had to wait for the first
        return 7

    found = []
    in_threads(2, lambda seed: found.append(cache.get(seed, make)))
    assert found == [7, 7]


def test_a_pickle_begins_empty():
    cache = files(3)
    with use(cache, "a") as opened:
        copy = pickle.loads(pickle.dumps(cache))
    with use(copy, "a") as other:
        assert other.key == "a"
        assert other is not opened
    assert copy.limit == 3


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_fork_begins_empty_even_while_another_thread_reads(pickled):
    """The lock that a thread of the parent holds is held for ever in the child."""
    cache = pickle.loads(pickle.dumps(files())) if pickled else files()
    holding, release = threading.Event(), threading.Event()

    def hold():
        with use(cache, "a"):
            holding.set()
            release.wait(30)

    def read_in_child():
        with use(cache, "a"):
            assert Opened.count == 2

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(30)
    child = multiprocessing.get_context("fork").Process(target=read_in_child)
    child.start()
    child.join(20)
    release.set()
    thread.join()
    child.kill()  # if it waits for ever
    child.join()
    assert child.exitcode == 0
