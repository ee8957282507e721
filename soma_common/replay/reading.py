"""What a replay reads: the log as its end tick shows it, narrowed by a filter, in order of position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from soma_common.ahead import Ahead, strides
from soma_common.consumer.source import Partition, Record, made_record
from soma_common.events.paging import PageBound
from soma_common.events.rows import KEY_HASH, SELECT, recorded_event
from soma_common.postgres.cursor import BEGINNING, Cursor, Diff, Tick, TickReader
from soma_common.postgres.pool import Pool, Row
from soma_common.replay.archived import Archived
from soma_common.replay.models import Offset, Progress, ReplayFilter, Scope
from soma_common.sql.loader import blocks


class Page(NamedTuple):
    """Events in order, and the cursor once all of them are done."""

    records: list[Record]
    after: Cursor | Offset


def cursor_after(record: Record) -> Cursor | Offset:
    """The cursor once a record of a page is done: its ``after`` is what the page was read of, one for all of them."""
    cursor: Cursor | Offset = record.after.after(record.offset)
    return cursor


class Pages(Protocol):
    """What a run reads."""

    async def next(self, cursor: Any, limit: int) -> Page | None:
        """The next events after a cursor, at most ``limit``; None at the end."""

    async def close(self) -> None:
        """Give up what was read ahead; safe to call twice."""


class LogPages:
    """Pages of the events of one run.

    It begins at the beginning of the log, where a diff has no stragglers: an era's rows in order of position are the
    order of each key (docs/explanation/reading-in-order.md), and a restart goes on behind the last position.
    """

    def __init__(self, pool: Pool, run: Progress, archived: Archived | None = None) -> None:
        self._pool, self._scope, self._wanted = pool, run.scope, run.wanted
        self._archived = archived or Archived(pool, None)
        self._ticks, self._bound = TickReader(pool), PageBound()
        self._reader = f"consumer:{run.consumer}"
        self._partitions: list[Partition] = []
        self._ahead: Ahead[tuple[Sequence[Row], bool]] = Ahead()
        self._following: Cursor | None = None
        self._end: Tick | None = None

    async def next(self, cursor: Cursor, limit: int) -> Page | None:
        """The next events after a cursor, at most ``limit``; None at the end.

        Raises:
            CursorLost: the database was promoted or restored to an earlier moment.
            ReplayRefused: events of the run were removed from the log meanwhile.
        """
        if self._end is None:
            self._end = await self._ticks.at(self._scope.end_tick, self._scope.end_token)
            shards = (await self._pool.fetch(blocks("rebuilds")["shards"], self._reader))[0][0]
            self._partitions = [Partition(self._reader, number) for number in range(shards)]
        diff = await self._ticks.next_diff(cursor, self._end)
        if diff is None:
            return None
        if self._ahead and self._following != cursor:
            await self._ahead.forget()
        if not self._ahead:
            self._ahead.begin(self._rows(diff, limit))
        rows, full = await self._ahead.take()
        if full:  # the next ones come while these are decoded and applied
            self._following = diff.after(rows[-1][0])
            self._ahead.begin(self._rows(replace(diff, position=rows[-1][0]), limit))
        records = await self._records(diff, rows)
        return Page(records, diff.after(rows[-1][0]) if full else diff.done())

    async def close(self) -> None:
        """Give up what was read ahead."""
        await self._ahead.forget()

    async def _rows(self, diff: Diff, most: int) -> tuple[Sequence[Row], bool]:
        """The next rows of a diff, and whether there may be more."""
        low, high = _span(diff, self._scope)
        if low >= high:
            return [], False
        limit = self._bound.limit(most)
        sql, args = page_query(self._wanted, low, high, diff.target.snapshot, limit)
        found = await self._pool.fetch_planned(sql, *args)
        rows = await self._archived.complete(found, self._wanted, low, high, limit, end_tick=self._scope.end_tick)
        self._bound.saw(rows)
        return rows, len(rows) == limit

    async def _records(self, diff: Diff, rows: Sequence[Row]) -> list[Record]:
        """Each in the partition where the live consumer has it."""
        partitions, mask, records = self._partitions, len(self._partitions) - 1, list[Record]()
        async for some in strides(rows):
            for row in some:
                partition = partitions[row[KEY_HASH] & mask]
                records.append(made_record((partition, row[0], 0, diff, recorded_event(row), None, None, 0, None)))
        return records


def _span(diff: Diff, scope: Scope) -> tuple[int, int]:
    """Above which position, and up to which, the rows of a diff lie that belong to a run."""
    return max(diff.low, scope.first_position - 1), min(diff.target.position_after, scope.last_position)


async def bounds(pool: Pool, wanted: ReplayFilter, end: Tick) -> tuple[int, int]:
    """The first and the last position that a run has to look at. A time range is looked up once, for all its pages."""
    times = {name: value for name, value in wanted.conditions().items() if isinstance(value, datetime)}
    if not times:
        return 1, end.position_after
    sql, args = bounds_query(times)
    first, last = (await pool.fetch_planned(sql, *args))[0]
    return first, min(last, end.position_after)


async def counts(pool: Pool, wanted: ReplayFilter, scope: Scope, inbox_id: int) -> Sequence[Row]:
    """Events of a run by (type, service, day): how many there are, and how many of them the inbox knows."""
    ticks, found, cursor = TickReader(pool), [], BEGINNING
    end = await ticks.at(scope.end_tick, scope.end_token)
    while (diff := await ticks.next_diff(cursor, end)) is not None:
        low, high = _span(diff, scope)
        if low < high:
            sql, args = counts_query(wanted, low, high, diff.target.snapshot, inbox_id)
            found += await pool.fetch_planned(sql, *args)
        cursor = diff.done()
    return found


def page_query(wanted: ReplayFilter, low: int, high: int, snapshot: str, limit: int) -> tuple[str, list[Any]]:
    """The statement of a page, and its arguments."""
    where, args = _where(wanted.conditions(), {"page": low, "page_end": high, "page_visible": snapshot})
    order = blocks("store")["oldest_first"].replace("$n", f"${len(args) + 1}")
    return f"{SELECT}{where}{order}", [*args, limit]


def bounds_query(times: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The statement that finds where a time range lies, and its arguments."""
    where, args = _where(times, {})
    return f"{blocks('replays')['bounds']}\n{where}", args


def counts_query(wanted: ReplayFilter, low: int, high: int, snapshot: str, inbox_id: int) -> tuple[str, list[Any]]:
    """The statement of a plan, and its arguments."""
    sql = blocks("replays")
    where, args = _where(wanted.conditions(), {"page": low, "page_end": high, "page_visible": snapshot})
    columns = sql["counts"].replace("$n", f"${len(args) + 1}")
    return f"{columns}\n{where}{sql['counted']}", [*args, inbox_id]


def _where(conditions: Mapping[str, Any], place: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Named fragments as one condition; values are always parameters."""
    store, replays = blocks("store"), blocks("replays")
    parts = [store[f"where_{name}"] for name in conditions] + [replays[name] for name in place]
    numbered = [part.replace("$n", f"${number}") for number, part in enumerate(parts, 1)]
    return f"WHERE {' AND '.join(numbered)}\n", [*conditions.values(), *place.values()]
