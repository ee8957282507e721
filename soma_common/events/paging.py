"""How many events a reader asks for at once: as many as may be, unless they are large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from soma_common.events.rows import size_of

PAGE_BYTES: Final = 20 * 2**20
_FIRST: Final = 20  # rows: of the largest events there are, about PAGE_BYTES
_GROWTH: Final = 4


class PageBound:
    """Bounds the pages of one reader to about ``PAGE_BYTES``, by the size of the events of the page before.

    It begins with few rows, asks for four times as many while pages come full and small, and for fewer at once when
    they come large. Large events that follow upon many small ones can make one page larger than that; a process that
    dies of it begins with few rows again.
    """

    def __init__(self) -> None:
        self._rows = _FIRST

    def limit(self, most: int) -> int:
        """How many rows to ask for, at most ``most``. A page is full when it has as many."""
        return min(most, self._rows)

    def saw(self, rows: Sequence[Sequence[Any]]) -> None:
        """Learn from a page, in the columns of SELECT."""
        if not rows:
            return
        rows_now = self._rows * _GROWTH if len(rows) >= self._rows else self._rows
        self._rows = max(1, min(rows_now, PAGE_BYTES * len(rows) // size_of(rows)))
