"""Open dead letters as figures, read from the database now and then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from soma_common.dlq.models import OPEN
from soma_common.errors import SomaError
from soma_common.health import Metric
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_SHARE: Final = 20  # counting may take one part in so many of the time


@dataclass(frozen=True, slots=True)
class OpenLetters:
    """The open letters of one consumer and status; ``oldest`` is the age of the oldest in seconds."""

    consumer: str
    status: str
    count: int
    oldest: float


class LetterGauges:
    """Knows the open letters of all consumers of a database, as they were counted last.

    Args:
        every: seconds between two counts; more when counting takes long.
    """

    def __init__(self, pool: Pool, *, every: float = 15.0) -> None:
        self._pool, self._every = pool, every
        self._found: tuple[OpenLetters, ...] = ()
        self._counted_at: float | None = None

    async def count(self) -> tuple[OpenLetters, ...]:
        """Count them now.

        Raises:
            InfrastructureError: the database is away; what was known stays.
        """
        rows = await self._pool.fetch(blocks("dead_letters")["gauges"])
        self._found = tuple(OpenLetters(*row) for row in rows)
        self._counted_at = time.monotonic()
        return self._found

    async def run(self) -> None:
        """Count again and again, until cancelled."""
        told = False
        while True:
            began = time.monotonic()
            try:
                await self.count()
                told = False
            except SomaError as error:
                log.log(logging.DEBUG if told else logging.WARNING, "Dead letters were not counted: %s", error)
                told = True
            await asyncio.sleep(max(self._every, _SHARE * (time.monotonic() - began)))

    def metrics(self) -> Iterator[Metric]:
        """What was counted last, and how old that is; nothing before the first count."""
        if self._counted_at is not None:
            yield from letter_metrics(self._found, time.monotonic() - self._counted_at)


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
