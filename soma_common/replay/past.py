"""What a rebuild reads: what the live consumer has settled, page after page; and, while it stands still, the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from soma_common.consumer.source import Partition, Record
from soma_common.dlq.models import RawRecord
from soma_common.errors import EventsArchived, ReplayRefused
from soma_common.events.codec import JsonCodec, placed
from soma_common.events.keys import kafka_key
from soma_common.events.models import RecordedEvent
from soma_common.events.paging import PageBound
from soma_common.events.rows import SELECT, recorded_event
from soma_common.postgres.cursor import Diff, Tick, TickReader, merge
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.replay.models import Progress
from soma_common.replay.reading import Page
from soma_common.sql.loader import blocks

_CODEC = JsonCodec()


class Rest(NamedTuple):
    """A record behind the pages, and whether the live consumer's stored position has passed it."""

    record: Record
    passed: bool


class TooMuch(Exception):
    """More is left than can be applied while the live consumer stands still."""


class Past(Protocol):
    """What a rebuild reads: behind the live consumer, and never beyond what that has settled."""

    async def next(self, limit: int) -> Page | None:
        """The next events, at most ``limit``; None when there is nothing more behind the live consumer just now."""

    async def behind(self) -> int:
        """How many places lie between the pages and the end of the source."""

    async def rest(self, tx: Any, most: int) -> list[Rest]:
        """What lies behind the pages and could be settled, while no batch of the consumer is in flight; more than
        ``most`` raises ``TooMuch``."""

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept."""


class LogPast:
    """The log behind the live consumer.

    A page ends at the newest tick that every shard of the consumer has passed: what it shows was decided. The cursor
    moves with the pages; whoever goes on after a stop makes another one from the stored cursor.
    """

    def __init__(self, pool: Pool, run: Progress) -> None:
        self._pool, self._reader = pool, f"consumer:{run.consumer}"
        self._ticks, self._bound = TickReader(pool), PageBound()
        self._partition = Partition(f"replay:{run.run_id}", 0)
        self._cursor = run.cursor
        self._end: Tick | None = None

    async def next(self, limit: int) -> Page | None:
        """The next events, at most ``limit``; None when there is nothing more behind the live consumer just now.

        Raises:
            CursorLost: the database was promoted or restored to an earlier moment.
            ReplayRefused: events were removed from the log, and nobody accepted that for this run.
        """
        diff = await self._diff()
        if diff is None:
            return None
        limit = self._bound.limit(limit)
        async with self._pool.connection() as connection:
            rows = await self._rows(connection, diff, limit)
        self._bound.saw(rows)
        place = rows[-1][0] if rows else self._cursor.position
        full = len(rows) == limit
        self._cursor = diff.after(place) if full else diff.done()._replace(position=place)
        return Page([self._record(diff, row) for row in rows], self._cursor)

    async def _diff(self) -> Diff | None:
        if self._end is not None and (diff := await self._ticks.next_diff(self._cursor, self._end)) is not None:
            return diff
        rows = await self._pool.fetch(blocks("replays")["passed"], self._reader)
        self._end = await self._ticks.at(*rows[0])
        return await self._ticks.next_diff(self._cursor, self._end)

    async def _rows(self, connection: Any, diff: Diff, limit: int) -> Sequence[Row]:
        """A gap ends the run, also one that was accepted for the consumer: that may have applied what is gone."""
        reader = self._partition.name
        try:
            return await _rows(connection, diff, limit, reader)
        except EventsArchived as error:
            raise ReplayRefused(
                "Events of this rebuild went into archives. It reads the log, and its tables would lack their effects.",
                cure="cancel it; or, if the tables shall begin with what is left, say"
                f" `somastack retention accept {reader}` and resume it.",
            ) from error

    def _record(self, diff: Diff, row: Row) -> Record:
        event = recorded_event(row)
        return Record(self._partition, row[0], 0, diff, event, key=kafka_key(event.stream)[0])

    async def behind(self) -> int:
        """How many positions lie between the pages and the end of the log."""
        end = (await self._pool.fetch(blocks("rebuilds")["log_end"]))[0][0]
        return int(end) - (self._end.position_after if self._end is not None else 0)

    async def rest(self, tx: Any, most: int) -> list[Rest]:
        """What lies behind the pages and could be settled, while no batch of the consumer is in flight.

        Raises:
            TooMuch: it is more than ``most``.
        """
        newest, cursor, records = Tick(*(await fetch(tx, _sql("newest_tick"), ()))[0]), self._cursor, list[Record]()
        while (diff := await self._ticks.next_diff(cursor, newest)) is not None:
            rows = await self._rows(tx, diff, most + 1)
            records += [self._record(diff, row) for row in rows]
            if len(records) > most:
                raise TooMuch
            cursor = diff.done()
        return await self._passed(tx, records)

    async def _passed(self, tx: Any, records: Sequence[Record]) -> list[Rest]:
        if not records:
            return []
        shards = (await fetch(tx, _sql("shards"), (self._reader,)))[0][0]
        places = [record.offset for record in records]
        rows = await fetch(tx, _sql("settled_in_log"), (places, self._reader, shards - 1))
        passed = {row[0] for row in rows}
        return [Rest(record, record.offset in passed) for record in records]

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept."""
        return placed(_CODEC.decode(raw.value or b""), {name: value or b"" for name, value in raw.headers})


async def _rows(connection: Any, diff: Diff, limit: int, reader: str) -> Sequence[Row]:
    """Rows of a diff in order of position. Stragglers can only be there when it does not begin at the beginning."""
    sql, base, target = blocks("store"), diff.base, diff.target
    whole = (reader, base.tick_id)
    args = (diff.low, target.position_after, base.xmax, target.snapshot, limit, *whole)
    rows = await fetch(connection, SELECT + sql["log_page"], args)
    if not diff.stragglers:
        return rows
    late = (diff.stragglers, diff.position, target.position_after, limit, *whole)
    return merge(limit, rows, await fetch(connection, SELECT + sql["log_stragglers"], late))


async def known(tx: Any, consumer_id: int, events: Sequence[RecordedEvent]) -> frozenset[UUID]:
    """The ids of those events that the consumer's inbox knows now."""
    if not events:
        return frozenset()
    columns = zip(*((e.event_id, e.tenant_id, e.service_id, e.idempotency_key) for e in events), strict=True)
    rows = await fetch(tx, _sql("known"), (consumer_id, *map(list, columns)))
    return frozenset(events[row[0] - 1].event_id for row in rows)


def _sql(name: str) -> str:
    return blocks("rebuilds")[name]
