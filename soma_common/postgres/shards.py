"""Shards of a reader: leased to workers, fenced by epoch, each with its cursor. Only the database's clock counts."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from soma_common.errors import InfrastructureError, TransactionConflict
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.cursor import BEGINNING, Cursor
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks
from soma_common.tasks import end


def worker_name() -> str:
    """A name for a worker of this process that no other one has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard that this worker owns under an epoch; the cursor is where it stood when it was claimed."""

    shard: int
    epoch: int
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard as operators see it."""

    shard: int
    owner: str | None
    epoch: int
    leased: bool
    cursor: Cursor
    moved_at: datetime


class Shards:
    """The shards of one reader, as one worker sees them.

    A reader's number of shards is fixed when it is first registered. Call :meth:`share` about three times per
    ``lease`` (seconds): it says who is alive, renews, claims, and tells which shards to give back for a fair share.
    """

    def __init__(self, pool: Pool, reader: str, worker: str, *, lease: float = 10.0) -> None:
        self._pool = pool
        self.reader, self.worker = reader, worker
        self.lease = timedelta(seconds=lease)
        self.owned: dict[int, Lease] = {}

    async def register(self, shards: int, start: Cursor = BEGINNING) -> None:
        """Make the reader's shards, standing at ``start``, unless they exist."""
        await self._pool.fetch(_sql("register"), self.reader, shards, start.from_tick, start.from_token)

    async def share(self) -> frozenset[int]:
        """Renew and claim, so that ``owned`` is what this worker owns; returns shards to drain and release."""
        await self.renew()
        workers, shards = (await self._pool.fetch(_sql("census"), self.reader))[0]
        fair = -(-shards // max(1, workers))
        if len(self.owned) < fair:
            wanted = fair - len(self.owned)
            for row in await self._pool.fetch(_sql("claim"), self.reader, self.worker, self.lease, wanted):
                self.owned[row[0]] = Lease(row[0], row[1], Cursor(*row[2:7]))
        return frozenset(sorted(self.owned)[fair:])

    async def renew(self) -> None:
        """Say that this worker is alive, and keep what it owns; what it has lost is not in ``owned`` any more."""
        await self._pool.fetch(_sql("alive"), self.reader, self.worker, self.lease)
        epochs = [lease.epoch for lease in self.owned.values()]
        renewed = await self._pool.fetch(_sql("renew"), self.reader, self.worker, self.lease, list(self.owned), epochs)
        kept = {row[0] for row in renewed}
        self.owned = {shard: lease for shard, lease in self.owned.items() if shard in kept}

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """What this worker owns stays its own however long the block takes: else others would take it, undrained."""
        renewing = asyncio.create_task(self._keep_renewing(), name=f"{self.reader} kept")
        try:
            yield
        finally:
            await end(renewing)

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 3)
            with suppress(InfrastructureError, TransactionConflict):
                await self.renew()

    async def reclaim(self) -> None:
        """Begin a new epoch of what this worker owns: what it has in flight will be refused.

        Waits for a transaction that is moving these shards, so ``owned`` says where they stand for certain.
        """
        rows = await self._pool.fetch(_sql("reclaim"), self.reader, self.worker, self.lease)
        self.owned = {row[0]: Lease(row[0], row[1], Cursor(*row[2:7])) for row in rows}

    async def save(
        self, cursors: Mapping[int, Cursor], tx: Any | None = None, *, was: Mapping[int, Cursor] | None = None
    ) -> frozenset[int]:
        """Write cursors of owned shards, in the caller's transaction if there is one.

        ``was`` names the cursors that must be there; without it any may be, for a reader whose truth is elsewhere: what
        the relay finds in Kafka may be ahead of its mirror here.

        Returns the shards that were lost to another worker: their cursors were not written, their work is not ours.
        Without a transaction of the caller the write is durable when this returns.
        """
        mine = {n: cursor for n, cursor in cursors.items() if n in self.owned}
        epochs = [self.owned[n].epoch for n in mine]
        before = [None if was is None else was[n] for n in mine]
        args = (self.reader, self.worker, list(mine), epochs, *_columns(list(mine.values())), *_columns(before))
        if tx is not None:
            rows = await fetch(tx, _sql("save"), args)
        else:
            async with self._pool.transaction(bound=SHORT) as connection:
                rows = await fetch(connection, _sql("save"), args)
        lost = frozenset(cursors) - {row[0] for row in rows}
        for shard in lost:
            self.owned.pop(shard, None)
        return lost

    async def release(self, shards: frozenset[int] | None = None) -> None:
        """Give back some shards, or all of them and leave.

        All are those that the database knows of: a claim that was cancelled as its answer came has happened.
        """
        await self._pool.fetch(_sql("release"), self.reader, self.worker, None if shards is None else sorted(shards))
        self.owned = {} if shards is None else {n: kept for n, kept in self.owned.items() if n not in shards}
        if shards is None:
            await self._pool.fetch(_sql("leave"), self.reader, self.worker)

    async def states(self) -> list[ShardState]:
        """Every shard of this reader."""
        rows = await self._pool.fetch(_sql("cursors"), self.reader)
        return [ShardState(row[0], row[1], row[2], row[3], Cursor(*row[4:9]), row[9]) for row in rows]


def _columns(cursors: Sequence[Cursor | None]) -> list[list[int | None]]:
    """Cursors as the arrays of ``save``; None is null in each."""
    fields = ("from_tick", "from_token", "to_tick", "to_token", "position")
    return [[getattr(cursor, field, None) for cursor in cursors] for field in fields]


def _sql(name: str) -> str:
    return blocks("readers")[name]
