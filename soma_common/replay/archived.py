"""Events of a replay that have left the log: read from archives, or a reason to refuse it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC
from heapq import merge
from typing import Any, Final

from soma_common.errors import EventsArchived, ReplayRefused
from soma_common.postgres.pool import Pool, Row
from soma_common.replay.models import ReplayFilter
from soma_common.retention.format import value_of
from soma_common.retention.reader import ArchiveReader
from soma_common.sql.loader import blocks

_AT_ONCE: Final = 1000  # positions looked up in the log by one statement


class Archived:
    """What retention took out of the log of ``pool``, as replays see it; ``reader`` has it, if anything has.

    Only what the database says was archived counts, by the checksum of its manifest: a place may also hold archives
    that were forged, given up, or made by a history that a restore has undone.
    """

    def __init__(self, pool: Pool, reader: ArchiveReader | None) -> None:
        self._pool, self._reader = pool, reader

    async def check(self, wanted: ReplayFilter, end_tick: int) -> None:
        """Refuse a replay of which something was removed, unless every archive of it can be read.

        Raises:
            ReplayRefused: names what is missing.
        """
        gone = await self._gone_of(wanted)
        if gone and self._reader is None:
            raise _refused(f"Events of this replay, up to position {max(row[4] for row in gone)}, went into archives.")
        await self._places(gone, end_tick)

    async def span(self, wanted: ReplayFilter, first: int, last: int) -> tuple[int, int]:
        """Positions between which the run lies, those of archived events included."""
        if self._reader is None:
            return first, last
        spans = await self._reader.spans(wanted.conditions(), await self._places(await self._gone_of(wanted)))
        low, high = min((span[0] for span in spans), default=first), max((span[1] for span in spans), default=last)
        return (first, last) if not spans else (low, high) if first > last else (min(low, first), max(high, last))

    async def complete(
        self, rows: Sequence[Row], wanted: ReplayFilter, low: int, high: int, limit: int, *, end_tick: int
    ) -> Sequence[Row]:  # fmt: skip
        """A page of the log with what was removed from it.

        Asked after the page was read: what it did not see any more is known by then.

        Raises:
            ReplayRefused: some of it cannot be had.
        """
        until = rows[-1][0] if len(rows) == limit else high
        kind = wanted.conditions().get("event_type")
        if self._reader is None:
            try:
                await self._pool.fetch(blocks("retention")["require_kept"], low, until, kind)
            except EventsArchived as error:
                raise _refused(error.message) from error
            return rows
        places = await self._places(await self._pool.fetch(blocks("retention")["gone"], low, until, kind), end_tick)
        archived = await self._reader.rows(wanted.conditions(), low, until, limit, only=places)
        whole: list[Row] = []
        for row in merge(rows, archived, key=lambda row: row[0]):
            if not whole or whole[-1][0] != row[0]:
                whole.append(row)
        return whole[:limit]

    async def counts(self, wanted: ReplayFilter, known: Sequence[Row]) -> list[Row]:
        """Counts by (type, service, day) of events that are in archives only, beside those of the log; the inbox is not
        asked."""
        found: Counter[tuple[Any, ...]] = Counter()
        async for rows in self._left(wanted):
            for row in rows:
                day = value_of(row, "timestamp").astimezone(UTC).date()
                found[value_of(row, "event_type"), value_of(row, "service_id"), day] += 1
        return [*known, *((*key, count, 0) for key, count in found.items())]

    async def _left(self, wanted: ReplayFilter) -> AsyncIterator[list[Row]]:
        """Archived events without those that are in the log yet: a removal takes its time."""
        if self._reader is None:
            return
        places = await self._places(await self._gone_of(wanted))
        some: list[Row] = []
        async for row in self._reader.walk(wanted.conditions(), 0, 2**63 - 1, only=places):
            some.append(row)
            if len(some) == _AT_ONCE:
                yield await self._without_the_logs(some)
                some = []
        yield await self._without_the_logs(some)

    async def _without_the_logs(self, rows: list[Row]) -> list[Row]:
        asked = [row[0] for row in rows]
        there = {row[0] for row in await self._pool.fetch(blocks("retention")["still_there"], asked)}
        return [row for row in rows if row[0] not in there]

    async def _gone_of(self, wanted: ReplayFilter) -> list[Row]:
        kind, since, until = (wanted.conditions().get(name) for name in ("event_type", "since", "until"))
        return await self._pool.fetch(blocks("retention")["gone_of"], kind, since, until)

    async def _places(self, gone: Sequence[Row], end_tick: int | None = None) -> frozenset[str]:
        """Where the archives are that rows of soma.archives speak of.

        Raises:
            ReplayRefused: one is missing, is not what was written, or was removed before the live consumer passed it.
        """
        if self._reader is None or not gone:
            return frozenset()
        known = {found.manifest.archive_id.int for found in await self._reader.archives()}
        afresh = any(archive_id.int not in known for archive_id, *_ in gone)  # made since it was looked up
        places: set[str] = set()
        for archive_id, location, digest, tick, *_ in gone:
            if end_tick is not None and tick > end_tick:
                raise ReplayRefused(
                    f"{location} was removed before the live consumer had passed it.",
                    cure="say `somastack retention accept`, and replay when the consumer has passed the rest.",
                )
            same = [f for f in await self._reader.archives(again=afresh) if f.manifest.archive_id.int == archive_id.int]
            afresh = False
            if not same:
                raise _refused(f"{location} is not among these archives, and holds events of this replay.")
            true = {found.location for found in same if found.digest == digest}
            if not true:
                raise _refused(f"The manifest in {same[0].location} is not the one that was written there.")
            places |= true
        return frozenset(places)


def _refused(message: str) -> ReplayRefused:
    return ReplayRefused(
        message, cure="name the archives (--archive PLACE), or begin later; see docs/how-to/retention.md."
    )
