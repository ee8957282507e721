"""The event log itself as a source: shards of the keys, leased to processes, read by the snapshot-diff cursor."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import orjson

from soma_common.ahead import Ahead, strides
from soma_common.consumer.source import Drain, Partition, Record, made_record
from soma_common.dlq.models import RawRecord
from soma_common.errors import ConfigurationError, InfrastructureError, LeaseLost, TransactionConflict
from soma_common.events.codec import JsonCodec, placed
from soma_common.events.keys import kafka_key
from soma_common.events.models import RecordedEvent
from soma_common.events.paging import PageBound
from soma_common.events.rows import ENVELOPE, KEY_HASH, PAYLOAD, SELECT, recorded_event
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.cursor import Cursor, Diff, TickReader, merge
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.postgres.shards import Shards, worker_name
from soma_common.ranges import check_settings
from soma_common.sql.loader import blocks
from soma_common.tasks import end

log = logging.getLogger(__name__)

_LEAST_IDLE = 0.002
_CODEC = JsonCodec()
_BRIEFLY = 0.02  # seconds of rest while a full partition may have room again
_FLUSH_EVERY = 1.0  # seconds between writes of cursors that moved without an event for us


def _cursor(record: Record) -> Cursor:
    """Where a shard stands once the record is done; its ``after`` is the diff, one for a whole page."""
    after: Cursor = record.after.after(record.offset)
    return after


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How a consumer reads the log.

    Args:
        shards: into how many parts the keys are split, a power of two; fixed when the consumer first starts.
        lease: seconds after which the shards of a silent process go to others.
        page, most_idle: most events of one query, fewer while they are large; most seconds between looks at nothing.
        worker: a name of this process, unique among the consumer's processes.
    """

    shards: int = 8
    lease: float = 10.0
    page: int = 1000
    most_idle: float = 0.5
    worker: str = field(default_factory=worker_name)

    def __post_init__(self) -> None:
        check_settings(self, shards=(1, 1024), lease=(0.05, 86_400), page=(1, 100_000), most_idle=(0.002, 3600))
        if self.shards & (self.shards - 1):
            raise ConfigurationError(f"{self.shards} shards.", cure="use a power of two up to 1024.")


@dataclass(slots=True)
class _Shard:
    """A shard under one epoch: read to ``at``, stored to ``stored``, handed out to ``handed`` (None: no further)."""

    epoch: int
    at: Cursor
    stored: Cursor
    handed: Cursor | None = None
    position: int | None = None
    halted: bool = False
    leaving: bool = False
    turn: int = 0


class LogSource:
    """Reads the log of a database for one consumer; several processes share the shards. Keeps ``Source``'s promises.

    Set ``wake`` after a commit of this process to be quicker than the next look.
    """

    def __init__(self, pool: Pool, consumer: str, settings: LogSettings | None = None) -> None:
        self.settings = settings or LogSettings()
        self.reader = f"consumer:{consumer}"
        self.wake = asyncio.Event()
        self._pool = pool
        self._shards = Shards(pool, self.reader, self.settings.worker, lease=self.settings.lease)
        self._ticks, self._bound = TickReader(pool), PageBound()
        self._mine: dict[int, _Shard] = {}
        self._buffer: deque[Record] = deque()
        self._ahead: Ahead[None] = Ahead()
        self._more = False
        self._sharing = asyncio.Lock()
        self._heart: asyncio.Task[None] | None = None
        self._ended: Exception | None = None
        self._turns, self._idle, self._flushed, self._newest = 0, _LEAST_IDLE, 0.0, 0

    def check_drain(self, seconds: float) -> None:
        """It may take as long as it likes: leases are renewed meanwhile."""

    async def start(self, consumer_id: int, drain: Drain) -> None:
        """Register the shards, take a fair share of them and keep renewing it."""
        if self._heart is not None:
            return
        await self._register()
        await self._share(drain)
        self._heart = asyncio.create_task(self._keep_sharing(drain), name=f"{self.reader} lease")

    async def _register(self) -> None:
        if not await self._shards.states():
            await self._shards.register(self.settings.shards)
        if (count := len(await self._shards.states())) != self.settings.shards:
            raise ConfigurationError(
                f"{self.reader} has {count} shards, not {self.settings.shards}.",
                cure=f"use {count}; the number is fixed when a consumer first starts.",
            )

    async def _keep_sharing(self, drain: Drain) -> None:
        while True:
            await asyncio.sleep(self.settings.lease / 3)
            try:
                await self._share(drain)
            except (InfrastructureError, TransactionConflict) as error:
                log.debug("%s: the lease could not be renewed: %s", self.reader, error)
            except Exception as error:
                self._ended = error
                return

    async def _share(self, drain: Drain) -> None:
        async with self._sharing:
            surplus = await self._shards.share()
            self._adopt()
            # A release that failed is made good: until then nobody reads these.
            surplus |= {number for number, shard in self._mine.items() if shard.leaving}
            if surplus:
                await self._give_back(surplus, drain)

    def _adopt(self) -> None:
        """Make our picture of the shards what the database said."""
        for number, lease in self._shards.owned.items():
            known = self._mine.get(number)
            if known is None or known.epoch != lease.epoch:
                self._mine[number] = _Shard(lease.epoch, lease.cursor, lease.cursor)
        for number in set(self._mine) - set(self._shards.owned):
            del self._mine[number]
        self._purge()

    async def _give_back(self, surplus: frozenset[int], drain: Drain) -> None:
        """Finish what is in flight, then release: the next owner begins where we stopped."""
        for number in surplus:
            self._mine[number].leaving = True
        self._purge()
        async with self._shards.kept():
            await drain([Partition(self.reader, number) for number in surplus])
        await self._shards.release(surplus)
        self._adopt()

    def _purge(self) -> None:
        """Drop what was read of shards that are not ours to deliver any more."""
        self._buffer = deque(record for record in self._buffer if self._delivers(record.partition.number, record.epoch))

    def _delivers(self, number: int, epoch: int) -> bool:
        shard = self._mine.get(number)
        return shard is not None and shard.epoch == epoch and not shard.halted and not shard.leaving

    async def fetch(self, most: int, without: Collection[Partition] = ()) -> Sequence[Record]:
        """The next events, or none after a wait that grows from 2 ms to ``most_idle``."""
        if self._ended is not None:
            raise self._ended
        if not (records := self._pop(most, without)):
            await self._refill(without)
            records = self._pop(most, without)
        if not records:
            await self._rest(bool(without))
            return ()
        self._idle = _LEAST_IDLE
        for number, record in {record.partition.number: record for record in records}.items():
            self._mine[number].handed = _cursor(record)
        if self._more and not self._ahead and len(self._buffer) <= self._bound.limit(self.settings.page) // 2:
            self._ahead.begin(self._fill(without))
        return records

    async def stay(self, seconds: float) -> None:
        """Wait; the leases are renewed beside."""
        if self._ended is not None:
            raise self._ended
        await asyncio.sleep(seconds)

    def _pop(self, most: int, without: Collection[Partition]) -> list[Record]:
        if not without:
            return [self._buffer.popleft() for _ in range(min(most, len(self._buffer)))]
        taken, kept = list[Record](), deque[Record]()
        for record in self._buffer:
            if len(taken) < most and record.partition not in without:
                taken.append(record)
            else:
                kept.append(record)
        self._buffer = kept
        return taken

    async def _refill(self, without: Collection[Partition]) -> None:
        if self._ahead:
            await self._ahead.take()
        if not any(record.partition not in without for record in self._buffer):
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                await self._flush()
            await self._fill(without)

    async def _rest(self, briefly: bool) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self._idle, _BRIEFLY) if briefly else self._idle):
                await self.wake.wait()
            self._idle = _LEAST_IDLE
        self.wake.clear()
        self._idle = min(self.settings.most_idle, self._idle * 1.5)

    async def _fill(self, without: Collection[Partition]) -> None:
        """Read the next page of those shards that waited longest; shards that stand alike are read together."""
        self._more = False
        latest = await self._ticks.latest()
        self._newest = latest.position_after
        for cursor, shards in self._groups(without):
            diff = await self._ticks.next_diff(cursor, latest)
            if diff is None:
                continue
            limit = self._bound.limit(self.settings.page)
            rows = await self._page(diff, list(shards), limit)
            self._bound.saw(rows)
            records, full = await self._decode(diff, rows, shards), len(rows) == limit
            self._take(records, shards, diff.after(rows[-1][0]) if full else diff.done())
            if records:
                self._more = full
                return

    def _groups(self, without: Collection[Partition]) -> list[tuple[Cursor, dict[int, _Shard]]]:
        groups: dict[Cursor, dict[int, _Shard]] = {}
        full = {partition.number for partition in without}
        for number, shard in self._mine.items():
            if not shard.halted and not shard.leaving and number not in full:
                groups.setdefault(shard.at, {})[number] = shard
        return sorted(groups.items(), key=lambda group: min(shard.turn for shard in group[1].values()))

    async def _page(self, diff: Diff, shards: list[int], limit: int) -> Sequence[Row]:
        sql, base, target = blocks("consumer"), diff.base, diff.target
        asked = (limit, self.settings.shards - 1, shards, self.reader, base.tick_id)
        async with self._pool.connection() as connection:
            args = (diff.low, target.position_after, base.xmax, target.snapshot, *asked)
            rows = await fetch(connection, SELECT + sql["log_page"], args)
            if not diff.stragglers:
                return rows
            late = (diff.stragglers, diff.position, target.position_after, *asked)
            return merge(limit, rows, await fetch(connection, SELECT + sql["log_stragglers"], late))

    async def _decode(self, diff: Diff, rows: Sequence[Row], shards: dict[int, _Shard]) -> list[Record]:
        mask, records = self.settings.shards - 1, []
        partitions = {number: Partition(self.reader, number) for number in shards}
        async for some in strides(rows):
            for row in some:
                number, event = row[KEY_HASH] & mask, recorded_event(row)
                size, key = ENVELOPE + len(row[PAYLOAD]), kafka_key(event.stream)[0]
                place = (partitions[number], row[0], shards[number].epoch, diff)
                records.append(made_record((*place, event, None, key, size, None)))
        return records

    def _take(self, records: Sequence[Record], shards: dict[int, _Shard], after: Cursor) -> None:
        """Buffer a page for the shards that are still ours under the epoch in which it was read."""
        self._turns += 1
        for number, shard in shards.items():
            if self._mine.get(number) is shard and self._delivers(number, shard.epoch):
                shard.at, shard.turn = after, self._turns
        self._buffer.extend(r for r in records if self._delivers(r.partition.number, r.epoch))

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        """Move the cursors; LeaseLost when a shard has another owner or epoch, or its cursor was set back."""
        await self._save(tx, {record.partition.number: (record.epoch, _cursor(record)) for record in records})

    async def _save(self, tx: Any, moves: dict[int, tuple[int, Cursor]]) -> None:
        lost = sorted(number for number, (epoch, _) in moves.items() if not self._owns(number, epoch))
        if not lost:
            cursors = {number: cursor for number, (_, cursor) in moves.items()}
            stored = {number: self._mine[number].stored for number in moves}
            lost = sorted(await self._shards.save(cursors, tx, was=stored))
        if lost:
            raise LeaseLost(
                f"Shards {lost} of {self.reader} were given to another worker, or the database was set back."
            )

    def _owns(self, number: int, epoch: int) -> bool:
        shard, lease = self._mine.get(number), self._shards.owned.get(number)
        return shard is not None and lease is not None and shard.epoch == lease.epoch == epoch

    async def saved(self, records: Sequence[Record]) -> None:
        """Remember what is stored."""
        self._remember({record.partition.number: (record.epoch, _cursor(record)) for record in records})
        for record in records:
            if record.partition.number in self._mine:
                self._mine[record.partition.number].position = record.offset

    def _remember(self, moves: dict[int, tuple[int, Cursor]]) -> None:
        for number, (epoch, cursor) in moves.items():
            shard = self._mine.get(number)
            if shard is not None and shard.epoch == epoch:
                shard.stored = cursor
                if shard.handed == cursor:
                    shard.handed = None

    async def _flush(self) -> None:
        """Store how far those shards were read of which nothing is read and unsettled."""
        self._flushed = time.monotonic()
        buffered = {record.partition.number for record in self._buffer}
        moves = {
            number: (shard.epoch, shard.at)
            for number, shard in self._mine.items()
            if shard.at != shard.stored and shard.handed is None
            and number not in buffered and not shard.halted and not shard.leaving
        }  # fmt: skip
        if moves:
            async with self._pool.transaction(bound=SHORT) as tx:
                await self._save(tx, moves)
            self._remember(moves)
        for shard in self._mine.values():
            if shard.at == shard.stored and shard.handed is None:
                shard.position = self._newest

    async def rewind(self) -> None:
        """Begin again at the stored cursors, under a new epoch: what is still in flight will be refused."""
        async with self._sharing:
            await self._ahead.forget()
            self._buffer.clear()
            halted = {number for number, shard in self._mine.items() if shard.halted}
            await self._shards.reclaim()
            self._ticks = TickReader(self._pool)
            self._adopt()
            for number in halted & set(self._mine):
                self._mine[number].halted = True

    def delivers(self, record: Record) -> bool:
        """Whether the shard is ours under the record's epoch, and not about to be given away."""
        shard = self._mine.get(record.partition.number)
        return shard is not None and shard.epoch == record.epoch and not shard.leaving

    def lag(self) -> Mapping[Partition, int]:
        """Positions of the log, other shards' included, from what is stored of each shard to the newest known tick."""
        stored = {number: shard.position for number, shard in self._mine.items() if shard.position is not None}
        return {Partition(self.reader, number): max(0, self._newest - at) for number, at in stored.items()}

    def raw(self, record: Record) -> RawRecord:
        """The event as the relay would have sent it in JSON."""
        assert record.event is not None, "every row of the log is an event"
        event = replace(record.event, event_id=UUID(int=record.event.event_id.int))  # a driver's own kind of UUID
        headers = (("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position))
        return RawRecord(
            topic=self.reader, partition=record.partition.number, offset=record.offset, key=record.key, headers=headers,
            value=_CODEC.encode(event, orjson.dumps(event.payload)), timestamp=event.timestamp,
        )  # fmt: skip

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in such a record.

        Raises:
            CodecError: there is none in it.
        """
        return placed(_CODEC.decode(raw.value or b""), {name: value or b"" for name, value in raw.headers})

    def halt(self, partition: Partition) -> None:
        """Read no more of this shard while we own it."""
        shard = self._mine.get(partition.number)
        if shard is not None:
            shard.halted = True
            self._purge()

    @property
    def assigned(self) -> frozenset[Partition]:
        """The shards this process owns."""
        return frozenset(Partition(self.reader, number) for number in self._mine)

    @property
    def halted(self) -> frozenset[Partition]:
        """Those of them that were halted."""
        return frozenset(Partition(self.reader, number) for number, shard in self._mine.items() if shard.halted)

    async def stop(self) -> None:
        """Release the shards and leave. Their stored cursors say what is settled."""
        heart, self._heart = self._heart, None
        if heart is None:
            return
        await end(heart)
        await self._ahead.forget()
        self._buffer.clear()
        await self._shards.release()
        self._mine.clear()
