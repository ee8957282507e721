"""What became of steps, counted by the worker that ran them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from soma_common.sagas.journal import Entry, What

STEPS: Final = (
    What.DONE, What.RETRYING, What.UNKNOWN, What.FAILED, What.UNDONE, What.UNDO_RETRYING, What.UNDO_FAILED,
)  # fmt: skip
"""Outcomes of attempts."""
TURNS: Final = (What.TURNED, What.STUCK, What.ENDED)
"""What happens to whole sagas."""


class SagaTally:
    """Counts what was written, by the names of sagas: of those there are few."""

    def __init__(self) -> None:
        self.steps: Counter[tuple[str, What]] = Counter()
        self.turns: Counter[tuple[str, What]] = Counter()
        self.seconds: Counter[str] = Counter()

    def written(self, saga: str, entries: Sequence[Entry]) -> None:
        """These entries of a saga are durable."""
        for entry in entries:
            if entry.what in STEPS:
                self.steps[saga, entry.what] += 1
                self.seconds[saga] += entry.took or 0.0  # type: ignore[assignment]  # a counter of seconds
            elif entry.what in TURNS:
                self.turns[saga, entry.what] += 1
