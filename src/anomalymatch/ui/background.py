"""Work that is done in the background, however often it is asked for."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Background:
    """A thread that does `work` when it is asked to; what is asked while it works is done once more, not many times.

    Args:
        work: what is to be done. If it fails, that is logged, and it is done again when it is next asked for.
        name: of the work, for the log.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work, self._name = work, name
        self._asked, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have the work done soon."""
        self._asked.set()

    def close(self) -> None:
        """Let what is being done finish, and do no more."""
        self._closed.set()
        self._asked.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._closed.is_set():
                return
            try:
                self._work()
            except Exception:  # the page goes on without a new ranking, and the next label tries again
                logger.exception("The %s failed", self._name)
