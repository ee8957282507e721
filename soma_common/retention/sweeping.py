"""Rows beside the log that are past their time: keys, the inbox, settled letters, replays that are over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from soma_common.clock import MICROSECOND
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool
from soma_common.retention.planning import before
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.removing import Gently
from soma_common.sql.loader import blocks

_AT_ONCE: Final = 50_000  # places looked up by one statement
_LATE: Final = timedelta(days=1)  # an id is made at most so long before its event is published by another service
_APPLIED: Final = timedelta(days=1)  # a row of the inbox stays at least so long, whatever the age of its id
_CLOCKS: Final = timedelta(minutes=5)  # an event's stamp may be so far ahead of the clock of whoever applies it
_NO_ID: Final = UUID(int=0)

Alive = Callable[[], Awaitable[None]]


class Sweeper:
    """Deletes in small transactions with rests between them."""

    def __init__(self, pool: Pool, policy: RetentionPolicy, alive: Alive, gently: Gently) -> None:
        self._pool, self._policy, self._alive, self._gently = pool, policy, alive, gently

    async def sweep(self, now: datetime, done: dict[str, int]) -> None:
        """Everything that is past its time at ``now``, by the database's clock; ``done`` counts rows by table."""
        policy = self._policy
        if (old := before(now, policy.idempotency_keys)) is not None:
            await self._keys("idempotency_keys", old, done)
        if (old := before(now, policy.inbox)) is not None:
            await self._inbox(old, done)
        if (old := before(now, policy.letters)) is not None:
            await self._batches("letters", old, done)
        if (old := before(now, policy.replays)) is not None:
            await self._batches("replays", old, done)

    async def _keys(self, table: str, old: datetime, done: dict[str, int]) -> None:
        """Places are looked up many at a time: each look walks over what was deleted before and not yet vacuumed."""
        while places := [row[0] for row in await self._pool.fetch(_sql(f"old_{table}"), old, _AT_ONCE)]:
            for start in range(0, len(places), self._gently.batch):
                await self._alive()
                some = places[start : start + self._gently.batch]
                gone = (await self._pool.fetch(_sql(f"delete_{table}"), some, old))[0][0]
                done[table] = done.get(table, 0) + gone
                await asyncio.sleep(self._gently.pause)

    async def _batches(self, table: str, old: datetime, done: dict[str, int]) -> None:
        while True:
            await self._alive()
            gone = (await self._pool.fetch(_sql(f"delete_{table}"), old, self._gently.batch))[0][0]
            done[table] = done.get(table, 0) + gone
            if gone < self._gently.batch:
                return
            await asyncio.sleep(self._gently.pause)

    async def _inbox(self, old: datetime, done: dict[str, int]) -> None:
        """Keys by batches, ids by whole partitions. The horizon is committed before anything goes (decision 0008)."""
        await self._pool.fetch(_sql("maintain_inbox"))
        await self._pool.fetch(_sql("mark"), _APPLIED)
        if await self._pool.fetch(_sql("old_inbox_keys"), old, 1):
            await self._raise_horizon(old + _CLOCKS)
        await self._keys("inbox_keys", old, done)
        marked = await self._pool.fetch(_sql("marked"), _APPLIED)
        for name, first, until in await self._pool.fetch(_sql("inbox"), old) if marked else ():
            await self._alive()
            emptied = await self._empty(name, first, until, *marked[0])
            done["inbox_partitions"] = done.get("inbox_partitions", 0) + emptied

    async def _empty(self, name: str, first: UUID | None, until: UUID, mark: str, marked_at: datetime) -> int:
        """Empty a partition of ids; 1 if it was done.

        Whatever goes was applied before the mark, so it was stamped before it: that bounds the horizon. Mostly it need
        not rise so far: to the last stamp of the ids in the log, and for events of other services to a day after the
        ids were made.
        """
        latest = (await self._pool.fetch_planned(_sql("latest"), first or _NO_ID, until))[0][0]
        reach = _made_at(until) + _LATE
        if latest is not None:
            reach = max(reach, latest + MICROSECOND)
        await self._raise_horizon(min(reach, marked_at + _CLOCKS))
        kept = (await self._pool.fetch(_sql("empty_inbox"), name, until, mark))[0][0]
        return int(kept >= 0)

    async def _raise_horizon(self, horizon: datetime) -> None:
        async with self._pool.transaction(bound=SHORT) as tx:
            await tx.fetch(_sql("horizon"), horizon)


def _made_at(event_id: UUID) -> datetime:
    """The moment in a UUIDv7."""
    return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=event_id.int >> 80)


def _sql(name: str) -> str:
    return blocks("retention")[name]
