"""Least-recently-used cache in memory, limited by the number or the total cost of its values."""

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Least-recently-used cache, safe in threads; it is empty after a fork or unpickling.

    The newest value stays even if it alone costs more than the limit.

    Args:
        limit: largest total cost of the values that are kept.
        cost: function that gives the cost of a value; None counts each as 1.
        close: function called with each value that is removed, for example to close a file.
    """

    def __init__(
        self,
        limit: float | int,
        *,
        cost: Callable[[V], float | int] | None = None,
        close: Callable[[V], object] | None = None,
    ) -> None:
        self.limit, self.cost, self.close = limit, cost, close
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._values: OrderedDict[K, tuple[V, float | int]] = OrderedDict()
        self._users: Counter[K] = Counter()
        self._total: float | int = 0
        _ALL.add(self)

    def __reduce__(self) -> tuple[Callable[[], "LRU[K, V]"], tuple[()]]:
        return partial(LRU, self.limit, cost=self.cost, close=self.close), ()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: K) -> V | None:
        """Return the value of `key`, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: K, value: V) -> None:
        """Store a value, replacing an older one with the same key."""
        with self._lock:
            if key in self._values:
                self._remove(key)
            price = 1 if self.cost is None else self.cost(value)
            self._values[key] = value, price
            self._total += price
            self._evict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`, calling `make` if it is not stored.

        `make` runs without the lock: two threads may make the same value at once. Use `use` for values with `close`.
        """
        value = self.find(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    @contextmanager
    def use(self, key: K, make: Callable[[], V]) -> Iterator[V]:
        """Give this thread exclusive use of the value of `key`, which is not closed before the block ends."""
        with self._lock:
            users = self._users
            users[key] += 1
            try:
                if key not in self._values:
                    self.put(key, make())
                self._values.move_to_end(key)
                yield self._values[key][0]
            finally:
                users[key] -= 1
                if not users[key]:
                    del users[key]

    def _evict(self) -> None:
        newest = next(reversed(self._values))
        for key in list(self._values):
            if self._total <= self.limit:
                return
            if key != newest and not self._users[key]:
                self._remove(key)

    def _remove(self, key: K) -> None:
        value, price = self._values.pop(key)
        self._total -= price
        if self.close is not None:
            self.close(value)


_ALL: "weakref.WeakSet[LRU[Any, Any]]" = weakref.WeakSet()


def _after_fork() -> None:
    """Empty every cache in a child process: it cannot share open files, or locks held by other threads."""
    for cache in list(_ALL):
        cache._reset()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
