"""Short computations on one thread, so that a busy machine does not slow them down fifty times."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

from threadpoolctl import ThreadpoolController

_lock = RLock()  # two blocks that overlap would restore each other's limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Let NumPy and PyTorch compute on one thread within this block.

    Their threads wait for each other after every small product. While a training runs on the same cores, such a wait
    takes as long as the scheduler leaves the other thread out: a second of work took nine.
    """
    with _lock, _controller().limit(limits=1):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
