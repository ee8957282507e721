"""Parked rows, as operators see and handle them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks


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


async def pinned(pool: Pool, *, name: str = "default") -> dict[str, int]:
    """The partition counts of the topics that a relay has sent to."""
    rows = await pool.fetch(blocks("outbox")["pins"], f"relay:{name}")
    return {row[0]: row[1] for row in rows}


async def accept_partitions(pool: Pool, topic: str, partitions: int, *, name: str = "default") -> int | None:
    """Pin another partition count for a topic and try its parked rows; returns the count pinned before.

    Do it only when the consumers of the topic have read everything: keys move to other partitions.
    """
    rows = await pool.fetch(blocks("outbox")["accept_partitions"], f"relay:{name}", topic, partitions)
    await unpark(pool, name=name, topic=topic)
    before: int | None = rows[0][0]
    return before
