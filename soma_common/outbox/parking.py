"""Parked rows: their second tries, and what operators do with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from soma_common.outbox.publishing import POSITION
from soma_common.outbox.queue import Outbox
from soma_common.postgres.pool import Pool, Row
from soma_common.sql.loader import blocks

_EVERY = 1.0  # seconds between two looks for rows that somebody wants to try again


@dataclass(frozen=True, slots=True)
class ParkedRow:
    """A row that is parked. ``reason`` is None where it only waits behind an earlier row of its key."""

    position: int
    topic: str
    key: bytes
    event_id: UUID
    event_type: str
    version: int
    reason: str | None
    parked_at: datetime
    wanted: bool
    size: int


class Retry:
    """When a pump looks for rows to try again, and how it names a try."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time to look; the next time is a second later."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _EVERY
        return True

    def again(self) -> None:
        """Look again at once: there may be more."""
        self._next = 0.0

    async def begin(self, rows: Sequence[Row]) -> UUID:
        """Name the try in the database before it is sent in a transaction that carries the name."""
        attempt = uuid4()
        await self._outbox.attempt([row[POSITION] for row in rows], attempt)
        return attempt


async def list_parked(
    pool: Pool, *, name: str = "default", topic: str | None = None, after: int = 0, limit: int = 100
) -> list[ParkedRow]:
    """Parked rows of a relay, by position; ``after`` is the last position of the page before."""
    rows = await pool.fetch(blocks("outbox")["parked"], f"relay:{name}", after, topic, limit)
    return [ParkedRow(*row) for row in rows]


async def unpark(
    pool: Pool, *, name: str = "default", topic: str | None = None, positions: Sequence[int] | None = None
) -> int:
    """Ask the relay to try parked rows again; how many rows that are.

    Whole keys are tried, oldest row first: those that own one of ``positions``, those of a topic, or all. The running
    relay does it within about a second. What is refused again stays parked.
    """
    given = None if positions is None else list(positions)
    return int((await pool.fetch(blocks("outbox")["unpark"], f"relay:{name}", topic, given))[0][0])


async def accept_partitions(pool: Pool, topic: str, partitions: int, *, name: str = "default") -> int | None:
    """Pin another partition count for a topic and try its parked rows; returns the count pinned before.

    Do it only when the consumers of the topic have read everything: keys move to other partitions.
    """
    rows = await pool.fetch(blocks("outbox")["accept_partitions"], f"relay:{name}", topic, partitions)
    await unpark(pool, name=name, topic=topic)
    before: int | None = rows[0][0]
    return before
