"""The outbox as the relay reads it: pages by group, rows that are put aside, pinned partition counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from soma_common.outbox.publishing import POSITION, SHARD
from soma_common.postgres.cursor import Cursor, Diff, merge
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.sql.loader import blocks

BlockedKey = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Page:
    """The next rows of a group: all that its diff has left, or the first of it."""

    diff: Diff
    rows: Sequence[Row]
    full: bool

    def end(self) -> Cursor:
        """The cursor once every row of the page is done."""
        return self.diff.after(self.rows[-1][POSITION]) if self.full else self.diff.done()

    def before(self, position: int) -> Cursor:
        """The cursor once the rows below a position are done."""
        done = [row[POSITION] for row in self.rows if row[POSITION] < position]
        return self.diff.after(done[-1] if done else self.diff.position)


@dataclass(frozen=True, slots=True)
class Aside:
    """A row to be parked; ``reason`` is None where it only follows an earlier parked row of its key."""

    shard: int
    position: int
    reason: str | None


class Outbox:
    """The statements of ``sql/outbox.sql`` for one relay (``reader``)."""

    def __init__(self, pool: Pool, reader: str) -> None:
        self._pool, self._reader = pool, reader

    async def pages(self, diffs: Mapping[int, Diff], limit: int) -> dict[int, Page]:
        """At most ``limit`` rows of each group's diff, ordered by position."""
        rows: dict[int, list[Row]] = {shard: [] for shard in diffs}
        late: dict[int, list[Row]] = {shard: [] for shard, diff in diffs.items() if diff.stragglers}
        async with self._pool.transaction() as connection:
            await fetch(connection, _sql("ordered"), ())
            _share_out(await fetch(connection, _sql("pages"), _bulk_arguments(diffs, limit)), rows)
        if late:
            # Few rows, found by their transaction: not along the order of positions.
            straggling = {shard: diffs[shard] for shard in late}
            _share_out(await self._pool.fetch(_sql("stragglers"), *_late_arguments(straggling, limit)), late)
        merged = {shard: merge(limit, rows[shard], late.get(shard, ())) for shard in diffs}
        return {shard: Page(diff, merged[shard], len(merged[shard]) >= limit) for shard, diff in diffs.items()}

    async def park(self, connection: Any, asides: Sequence[Aside]) -> None:
        """Copy rows to the parked ones, in the transaction of the connection."""
        columns = ([a.shard for a in asides], [a.position for a in asides], [a.reason for a in asides])
        await fetch(connection, _sql("park"), (self._reader, *columns))

    async def blocked(self, shards: Sequence[int]) -> dict[int, set[BlockedKey]]:
        """The keys of each group that have parked rows."""
        found: dict[int, set[BlockedKey]] = {shard: set() for shard in shards}
        for shard, topic, key in await self._pool.fetch(_sql("blocked"), self._reader, list(shards)):
            found[shard].add((topic, key))
        return found

    async def parked_counts(self) -> dict[int, int]:
        """Parked rows by group."""
        return {row[0]: row[1] for row in await self._pool.fetch(_sql("parked_counts"), self._reader)}

    async def wanted(self, shards: Sequence[int], limit: int) -> list[Row]:
        """Parked rows of keys that are to be tried again, in order."""
        return await self._pool.fetch(_sql("wanted"), self._reader, list(shards), limit)

    async def attempt(self, positions: Sequence[int], attempt: UUID) -> None:
        """Name a try before it is sent."""
        await self._pool.fetch(_sql("attempt"), self._reader, list(positions), attempt)

    async def attempted(self, attempt: UUID) -> None:
        """Remove what a committed try has sent; nothing if that was done before."""
        await self._pool.fetch(_sql("attempted"), self._reader, attempt)

    async def unparked(self, positions: Sequence[int]) -> None:
        """Remove rows that were sent."""
        await self._pool.fetch(_sql("unparked"), self._reader, list(positions))

    async def refuse_again(self, reasons: Mapping[int, str]) -> None:
        """Keep rows, and their keys, parked."""
        await self._pool.fetch(_sql("refuse_again"), self._reader, list(reasons), list(reasons.values()))

    async def pin(self, topic: str, partitions: int) -> int:
        """The pinned partition count of a topic: this one if it is the first."""
        return int((await self._pool.fetch(_sql("pin"), self._reader, topic, partitions))[0][0])


def _share_out(found: Sequence[Row], pages: dict[int, list[Row]]) -> None:
    for row in found:
        pages[row[SHARD]].append(row)


def _bulk_arguments(diffs: Mapping[int, Diff], limit: int) -> tuple[Any, ...]:
    return (
        list(diffs),
        [diff.low for diff in diffs.values()],
        [diff.target.position_after for diff in diffs.values()],
        [diff.base.xmax for diff in diffs.values()],
        [diff.target.snapshot for diff in diffs.values()],
        limit,
    )


def _late_arguments(diffs: Mapping[int, Diff], limit: int) -> tuple[Any, ...]:
    return (
        list(diffs),
        [diff.position for diff in diffs.values()],
        [diff.target.position_after for diff in diffs.values()],
        ["{" + ",".join(diff.stragglers) + "}" for diff in diffs.values()],
        limit,
    )


def _sql(name: str) -> str:
    return blocks("outbox")[name]
