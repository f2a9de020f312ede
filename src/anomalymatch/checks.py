"""Checks of configuration values: ranges, choices, and trust in archives."""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real

from anomalymatch.errors import ConfigError, DataError
from anomalymatch.text import listed

Number = float | int


def check_range(
    key: str,
    value: object,
    *,
    low: Number | None = None,
    high: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
    null: bool = False,
) -> None:
    """Check that low <= value <= high and above < value < below, for the limits that are given; NaN is in no range.

    `below=math.inf` allows finite numbers only, `null` also None.

    Raises:
        ConfigError: if the value of the key is not a number or out of range.
    """
    if value is None and null:
        return
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if (
            not math.isnan(number)
            and (low is None or number >= low)
            and (high is None or number <= high)
            and (above is None or number > above)
            and (below is None or number < below)
        ):
            return
    raise ConfigError(f"{key} is {value}: it must be {_range(low, high, above, below)}{', or null' if null else ''}")


def check_choice(key: str, value: object, choices: Iterable[object], *, null: bool = False) -> None:
    """Check that the value of a key is one of the choices, or, with `null`, None.

    Raises:
        ConfigError: if it is not; the message suggests the most similar choice.
    """
    names = list(choices)
    if value in names or (value is None and null):
        return
    allowed = listed(names, most=40) + (", or null" if null else "")
    close = nearest(str(value), map(str, names))
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"{key} is {value!r}: choose one of {allowed}{hint}")


_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Allow, or refuse as by default, that archives opened inside of this block refer to files outside of them."""
    token = _TRUSTED.set(trust)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Tell whether archives may refer to files outside of them."""
    return _TRUSTED.get()


def check_inside(path: object, what: str, outside: bool) -> None:
    """Refuse an archive at `path` in which `what` refers to a file `outside` of it, unless it is trusted.

    Raises:
        DataError: if it does.
    """
    if outside and not is_trusted():
        raise DataError(f"{path}: {what}, by which any file could be read: set trust=true if you trust its author")


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the `count` most similar of the known words, best first; fewer, or none, if they are not similar."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def _range(low: Number | None, high: Number | None, above: Number | None, below: Number | None) -> str:
    if low is not None and high is not None:
        return f"between {_shown(low)} and {_shown(high)}"
    limits = [
        f"{word} {_shown(limit)}"
        for word, limit in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if limit is not None and limit != math.inf
    ]
    return " and ".join((["a finite number"] if below == math.inf else []) + limits) or "a number"


def _shown(limit: Number) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
