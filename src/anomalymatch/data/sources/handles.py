"""Open files that many reads share: the latest few stay open, each process has its own."""

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
LIMIT = 64


class Handles(Generic[K, T]):
    """Opens by key, and closes what has not been used for longest; safe in threads, forks and pickles.

    Args:
        open_: opens the file of a key; must be picklable if this is to be.
        close: closes what `open_` returned.
        limit: how many stay open, at least one. What is in use stays open beyond it.
    """

    def __init__(self, open_: Callable[[K], T], close: Callable[[T], None], *, limit: int = LIMIT) -> None:
        self.open, self.close, self.limit = open_, close, limit
        self._reset()
        _ALL.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._opened: OrderedDict[K, T] = OrderedDict()
        self._users: Counter[K] = Counter()

    def __getstate__(self) -> dict[str, object]:
        return {"open": self.open, "close": self.close, "limit": self.limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()
        _ALL.add(self)

    @contextmanager
    def use(self, key: K) -> Iterator[T]:
        """The open file of `key`, for this thread alone while the block runs."""
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self.open(key)
            self._opened.move_to_end(key)
            opened, users = self._opened[key], self._users
            users[key] += 1
            try:
                if len(self._opened) > self.limit:
                    self._close_oldest()
                yield opened
            finally:
                users[key] -= 1

    def _close_oldest(self) -> None:
        """Make room; a file that this thread is using further out stays open."""
        idle = [key for key in self._opened if not self._users[key]]
        for key in idle[: len(self._opened) - self.limit]:
            del self._users[key]
            self.close(self._opened.pop(key))


_ALL: "weakref.WeakSet[Handles[Any, Any]]" = weakref.WeakSet()


def _after_fork() -> None:
    """What a parent process has open, and its locks, whoever held them, are of no use to its child."""
    for handles in list(_ALL):
        handles._reset()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_after_fork)
