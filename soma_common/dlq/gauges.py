"""Open dead letters as figures, read from the database now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from soma_common.counting import Counted
from soma_common.dlq.models import OPEN
from soma_common.health import Metric
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks


@dataclass(frozen=True, slots=True)
class OpenLetters:
    """The open letters of one consumer and status; ``oldest`` is the age of the oldest in seconds."""

    consumer: str
    status: str
    count: int
    oldest: float


class LetterGauges(Counted):
    """Knows the open letters of all consumers of a database, as they were counted last."""

    def __init__(self, pool: Pool, *, every: float = 15.0) -> None:
        super().__init__("Dead letters", every=every)
        self._pool = pool
        self._found: tuple[OpenLetters, ...] = ()

    async def count(self) -> tuple[OpenLetters, ...]:
        """Count them now."""
        rows = await self._pool.fetch(blocks("dead_letters")["gauges"])
        self._found = tuple(OpenLetters(*row) for row in rows)
        self.counted()
        return self._found

    def metrics(self) -> Iterator[Metric]:
        """What was counted last, and how old that is; nothing before the first count."""
        since = self.since
        if since is not None:
            yield from letter_metrics(self._found, since)


def letter_metrics(found: Sequence[OpenLetters], since: float) -> Iterator[Metric]:
    """Counts and ages by consumer and status, as they were ``since`` seconds ago."""
    known = {(letters.consumer, letters.status): letters for letters in found}
    every = [(name, status.value) for name in sorted({one.consumer for one in found}) for status in OPEN]
    for name, words, aged in (
        ("soma_dead_letters", "Open letters.", False),
        ("soma_dead_letters_oldest_seconds", "Age of the oldest of them.", True),
    ):
        for consumer, status in every:
            one = known.get((consumer, status), OpenLetters(consumer, status, 0, -since))
            labels = {"consumer": consumer, "status": status}
            yield Metric(name, "gauge", words, one.oldest + since if aged else one.count, labels)
    yield Metric("soma_dead_letters_counted_seconds", "gauge", "Since they were counted.", since)
