import os
import pickle
import threading
import time

import pytest

from anomalymatch.data.sources.handles import LIMIT, Handles


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


def make(limit=LIMIT):
    return Handles(Opened, Opened.close, limit=limit)


def test_a_file_is_opened_once():
    handles = make()
    with handles.use("a") as first:
        assert first.key == "a"
    with handles.use("a") as second:
        assert second is first
    with handles.use("b") as other:
        assert other.key == "b"
    assert Opened.count == 2
    assert not first.closed


def test_what_was_not_used_for_longest_is_closed_first():
    handles, seen = make(2), {}
    for key in "abac":
        with handles.use(key) as seen[key]:
            assert not seen[key].closed
    assert {key: opened.closed for key, opened in seen.items()} == {"a": False, "b": True, "c": False}
    with handles.use("b") as again:
        assert again is not seen["b"]
    assert seen["a"].closed


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_twin(limit):
    """Against a list of the latest keys."""
    handles, latest = make(limit), []
    for step in range(300):
        key = (step * step // 7) % 11
        before = Opened.count
        with handles.use(key) as opened:
            assert (opened.key, opened.closed) == (key, False)
        assert Opened.count - before == (key not in latest)
        latest = [k for k in latest if k != key][-(limit - 1) :] if limit > 1 else []
        latest.append(key)


def test_what_is_in_use_further_out_stays_open():
    handles = make(1)
    with handles.use("a") as outer:
        with handles.use("b") as inner, handles.use("a") as same:
            assert same is outer
            assert not inner.closed
        assert not outer.closed
    with handles.use("c"):
        assert outer.closed
        assert inner.closed


def test_a_file_that_does_not_open_is_tried_again():
    handles = make(1)
    for _ in range(2):
        with pytest.raises(FileNotFoundError), handles.use("missing"):
            pass
    with handles.use("a") as opened:
        assert not opened.closed


def test_an_error_inside_of_the_block_frees_the_file():
    handles = make(1)
    with pytest.raises(ValueError, match="bad pixels"), handles.use("a") as opened:
        raise ValueError("bad pixels")
    done = threading.Thread(target=lambda: handles.use("b").__enter__())
    done.start()
    done.join(5)
    assert not done.is_alive()
    assert opened.closed


def test_one_thread_at_a_time():
    handles, inside, most = make(2), [0], [0]

    def work(seed):
        for step in range(20):
            with handles.use((seed * step) % 5) as opened:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(1e-5)
                assert not opened.closed
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_pickle_opens_anew():
    handles = make(3)
    with handles.use("a") as opened:
        copy = pickle.loads(pickle.dumps(handles))
    with copy.use("a") as other:
        assert other.key == "a"
        assert other is not opened
    assert copy.limit == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_fork_opens_anew_even_while_another_thread_reads(pickled):
    """The lock that a thread of the parent holds is held for ever in the child."""
    handles = make()
    if pickled:
        handles = pickle.loads(pickle.dumps(handles))
    holding, release = threading.Event(), threading.Event()

    def hold():
        with handles.use("a"):
            holding.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(30)
    child = os.fork()
    if not child:
        code = 1
        try:
            with handles.use("a"):
                code = 0 if Opened.count == 2 else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    thread.join()
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended[0], "the child waits for ever"
    assert os.waitstatus_to_exitcode(ended[1]) == 0
