"""Open files that many reads share: the latest few stay open, each process has its own."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
LIMIT = 64


class Handles(Generic[K, T]):
    """Opens by key, and closes what has not been used for longest; safe in threads, forks and pickles.

    Args:
        open_: opens the file of a key; must be picklable if this is to be.
        close: closes what `open_` returned.
        limit: how many stay open.
    """

    def __init__(self, open_: Callable[[K], T], close: Callable[[T], None], *, limit: int = LIMIT) -> None:
        self.open, self.close, self.limit = open_, close, limit
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._opened: OrderedDict[K, T] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"open": self.open, "close": self.close, "limit": self.limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    @contextmanager
    def use(self, key: K) -> Iterator[T]:
        """The open file of `key`, for this thread alone while the block runs."""
        if self._process != os.getpid():  # what a parent process has open does not survive a fork
            self._reset()
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self.open(key)
                if len(self._opened) > self.limit:
                    self.close(self._opened.popitem(last=False)[1])
            self._opened.move_to_end(key)
            yield self._opened[key]
