"""Writes cursors, and parks rows in the same transaction; fenced by the leases' epochs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from soma_common.errors import LeaseLost
from soma_common.outbox.groups import Batch, Group
from soma_common.outbox.publishing import KEY, POSITION, TOPIC
from soma_common.outbox.queue import Aside
from soma_common.outbox.settings import Parts
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.cursor import Cursor

log = logging.getLogger(__name__)


class Saver:
    """Saves the cursors of some groups; one save at a time, the next rows are sent meanwhile."""

    def __init__(self, parts: Parts, groups: dict[int, Group]) -> None:
        self._p, self._groups = parts, groups
        self._saving: asyncio.Task[None] | None = None
        self.saved_at = 0.0

    async def begin(self, batch: Batch, *, park: bool) -> None:
        """Start saving the ends of a batch. When rows are parked with them, wait until that is done."""
        await self.finish()
        self._saving = asyncio.create_task(self.save(batch, batch.ends(), batch.asides if park else ()))
        if batch.asides:
            await self.finish()

    async def finish(self) -> None:
        """Until the save that is under way is done; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def give_up(self) -> None:
        """End the save that is under way, whatever becomes of it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await asyncio.wait({saving}, timeout=1.0)
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)

    async def save(self, batch: Batch, cursors: Mapping[int, Cursor], asides: Sequence[Aside]) -> None:
        """Write cursors and park rows, in one transaction; groups that were lost meanwhile are dropped."""
        async with self._p.pool.transaction(bound=SHORT) as connection:
            ours = {s: cursor for s, cursor in cursors.items() if self._is_ours(s, batch.epochs.get(s))}
            lost = (frozenset(cursors) - frozenset(ours)) | await self._p.shards.save(ours, connection)
            kept = [aside for aside in asides if aside.shard not in lost]
            if kept:
                await self._p.outbox.park(connection, kept)
        self._p.database.found()
        self.saved_at = time.monotonic()
        for shard, cursor in ours.items():
            if shard not in lost and shard in self._groups:
                self._groups[shard].saved = cursor
        for shard in lost:
            self._groups.pop(shard, None)
        self._parked(batch, kept)

    async def save_moved(self) -> None:
        """Save cursors that moved over ticks without rows. Only while nothing is in flight."""
        await self.finish()
        moved = {shard: group.next for shard, group in self._groups.items() if group.next != group.saved}
        self.saved_at = time.monotonic()
        if moved:
            epochs = {shard: self._groups[shard].epoch for shard in moved}
            await self.save(Batch(epochs=epochs), moved, ())

    async def park_first(self, batch: Batch) -> None:
        """Park rows before the broker's transaction that goes past them.

        If that transaction fails, they are met again and found parked already.

        Raises:
            LeaseLost: the group has another owner.
        """
        await self.finish()
        async with self._p.pool.transaction(bound=SHORT) as connection:
            unmoved = {shard: group.saved for shard, group in self._groups.items()}
            if any(not self._is_ours(s, e) for s, e in batch.epochs.items()):
                raise LeaseLost
            if await self._p.shards.save(unmoved, connection):
                raise LeaseLost
            await self._p.outbox.park(connection, batch.asides)
        self._parked(batch, batch.asides)

    def _is_ours(self, shard: int, epoch: int | None) -> bool:
        """Whether the lease is still the one under which the rows were read."""
        lease = self._p.shards.owned.get(shard)
        return lease is not None and lease.epoch == epoch

    def _parked(self, batch: Batch, asides: Sequence[Aside]) -> None:
        if not asides:
            return
        self._p.meter.parked += len(asides)
        rows: dict[int, Any] = {row[POSITION]: row for page in batch.pages.values() for row in page.rows}
        hook = self._p.settings.on_parked
        for aside in asides:
            row = rows[aside.position]
            if aside.shard in self._groups:
                self._groups[aside.shard].blocked.add((row[TOPIC], row[KEY]))
            if aside.reason is not None:
                log.error("Row %d of the outbox is parked, and its key with it: %s", aside.position, aside.reason)
            if hook is not None:
                hook(row[TOPIC], row[KEY], aside.position, aside.reason or "follows a parked row of its key")
