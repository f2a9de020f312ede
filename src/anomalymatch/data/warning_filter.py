"""Temporary filter of warnings that is safe in threads."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

ASTROPY = r"astropy\."
"""Modules whose warnings are ignored: they are about the contents of single files."""


@contextmanager
def ignore_warnings(module: str) -> Iterator[None]:
    """Ignore warnings that modules with names matching the regular expression `module` raise in the block.

    `warnings.catch_warnings` exchanges the filters of all threads and may restore them in a wrong order. This adds one
    filter and removes it again; meanwhile it also applies in other threads.
    """
    added = ("ignore", None, Warning, re.compile(module), 0)
    filters = cast(list[Any], warnings.filters)
    filters.insert(0, added)
    try:
        yield
    finally:
        with suppress(ValueError):  # something else has reset the filters
            filters.remove(added)
