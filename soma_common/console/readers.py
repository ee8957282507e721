"""Who reads: consumers of the log and relays with their shards, consumers of Kafka with their partitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Final

from starlette.responses import Response

from soma_common.console.backend import Backend
from soma_common.console.web import Ask, Page


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of what a reader reads. ``lag``: positions behind the newest one, at most so many events."""

    number: int
    owner: str | None
    epoch: int
    leased: bool
    moved_at: datetime
    position: int
    lag: int


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader of the log, or a relay. ``waits_since``: when the oldest event behind its slowest shard was recorded."""

    name: str
    shards: tuple[Shard, ...]
    workers: int
    waits_since: datetime | None
    parked: int

    @property
    def lag(self) -> int:
        """Of the slowest shard."""
        return max(shard.lag for shard in self.shards)

    @property
    def owned(self) -> int:
        """Shards that somebody has now."""
        return sum(shard.leased for shard in self.shards)

    @property
    def is_relay(self) -> bool:
        """Whether it brings events to Kafka."""
        return self.name.startswith("relay:")


async def readers(backend: Backend) -> list[Reader]:
    """All readers of the log, with how far they are."""
    rows = await backend.fetch("readers")
    workers = {row[0]: row[1] for row in await backend.fetch("workers")}
    parked = {row[0]: row[1] for row in await backend.fetch("parked")}
    by_name = {name: tuple(_shard(row) for row in group) for name, group in groupby(rows, key=lambda row: row[0])}
    slowest = {name: min(shard.position for shard in shards) for name, shards in by_name.items()}
    since = {row[0]: row[1] for row in await backend.fetch("next_after", sorted(set(slowest.values())))}
    return [
        Reader(name, shards, workers.get(name, 0), since.get(slowest[name]), parked.get(name, 0))
        for name, shards in by_name.items()
    ]


def _shard(row: Sequence[Any]) -> Shard:
    _, number, owner, epoch, leased, moved_at, position, newest = row
    return Shard(number, owner, epoch, bool(owner) and leased, moved_at, position, max(0, newest - position))


async def page(ask: Ask) -> Response:
    """Consumers, relays, their shards and partitions. Their figures are of all tenants together."""
    ask.must_see_all()
    offsets = await ask.backend.fetch("offsets")
    by_consumer = {name: list(rows) for name, rows in groupby(offsets, key=lambda row: row[0])}
    return ask.page(
        "readers.html", readers=await readers(ask.backend), offsets=by_consumer,
        topics=await ask.backend.fetch("topics"), database=(await ask.backend.fetch("database"))[0],
    )  # fmt: skip


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (("/readers", "GET", page),)
