"""Which images mention a word, in their id or in what is known of them."""

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from anomalymatch.ui.recent import Recent

logger = logging.getLogger(__name__)
REMEMBERED = 8


class TextFilter:
    """Finds text in ids and metadata, in any case of letters.

    Args:
        ids: all images.
        metadata: columns of any type, a row for each image; None without any.
    """

    def __init__(self, ids: Sequence[str], metadata: pa.Table | None) -> None:
        self._ids, self._metadata = ids, pa.table({}) if metadata is None else metadata
        self._recent: Recent[Bool[np.ndarray, " n"]] = Recent(REMEMBERED)

    def matches(self, text: str) -> Bool[np.ndarray, " n"]:
        """Whether each image has `text` in its id or in a column."""
        return self._recent.get(text, lambda: self._search(text))

    def _search(self, text: str) -> Bool[np.ndarray, " n"]:
        pattern = pc.utf8_lower(pa.scalar(text)).as_py()
        found = np.zeros(len(self._ids), dtype=bool)
        for column in self._columns:
            hits = pc.match_substring(column, pattern).fill_null(False)
            found |= hits.to_numpy(zero_copy_only=False) if isinstance(hits, pa.Array) else hits.to_numpy()
        return found

    @cached_property
    def _columns(self) -> list[pa.Array | pa.ChunkedArray]:
        """All text in small letters, made when it is first asked for; 64-bit offsets hold more than two gigabytes."""
        columns = [pc.utf8_lower(pa.array(list(self._ids), pa.large_string()))]
        for name in self._metadata.column_names:
            try:
                columns.append(pc.utf8_lower(self._metadata.column(name).cast(pa.large_string())))
            except pa.ArrowException as error:  # lists and structures have no text
                logger.debug("The column %s is not searched: %s", name, error)
        return columns
