"""Events of a replay that have left the log: read from archives, or a reason to refuse it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC
from heapq import merge
from typing import Any, Final

from soma_common.errors import EventsArchived, ReplayRefused
from soma_common.postgres.pool import Pool, Row
from soma_common.replay.models import ReplayFilter
from soma_common.retention.format import value_of
from soma_common.retention.reader import ArchiveReader
from soma_common.sql.loader import blocks

_PAGE: Final = 5000  # archived events that the log is asked about at once


class Archived:
    """What retention took out of the log of ``pool``, as replays see it; ``reader`` has it, if anything has."""

    def __init__(self, pool: Pool, reader: ArchiveReader | None) -> None:
        self._pool, self._reader = pool, reader

    async def check(self, wanted: ReplayFilter, end_tick: int) -> None:
        """Refuse a replay of which something was removed, unless every archive of it can be read.

        Raises:
            ReplayRefused: names what is missing.
        """
        kind, since, until = (wanted.conditions().get(name) for name in ("event_type", "since", "until"))
        gone = await self._pool.fetch(blocks("retention")["gone_of"], kind, since, until)
        if gone and self._reader is None:
            raise _refused(f"Events of this replay, up to position {max(row[1] for row in gone)}, went into archives.")
        known = {found.manifest.archive_id.int for found in await self._reader.archives()} if self._reader else set()
        for archive_id, _, location, tick in gone:
            if archive_id.int not in known:
                raise _refused(f"{location} is not among these archives, and holds events of this replay.")
            if tick > end_tick:
                raise _refused(f"{location} was removed before the live consumer had passed it.")

    async def span(self, wanted: ReplayFilter, first: int, last: int) -> tuple[int, int]:
        """Positions between which the run lies, those of archived events included."""
        spans = await self._reader.spans(wanted.conditions()) if self._reader else []
        low, high = min((span[0] for span in spans), default=first), max((span[1] for span in spans), default=last)
        return (first, last) if not spans else (low, high) if first > last else (min(low, first), max(high, last))

    async def complete(
        self, rows: Sequence[Row], wanted: ReplayFilter, low: int, high: int, limit: int
    ) -> Sequence[Row]:  # fmt: skip
        """A page of the log with what was removed from it.

        Asked after the page was read: what it did not see any more is known by then.

        Raises:
            ReplayRefused: some of it cannot be had.
        """
        until = rows[-1][0] if len(rows) == limit else high
        if self._reader is None:
            kind = wanted.conditions().get("event_type")
            try:
                await self._pool.fetch(blocks("retention")["require_kept"], low, until, kind)
            except EventsArchived as error:
                raise _refused(error.message) from error
            return rows
        known = {found.manifest.archive_id.int for found in await self._reader.archives()}
        for archive_id, location in await self._pool.fetch(blocks("retention")["gone"], low, until):
            if archive_id.int not in known:
                raise _refused(f"{location} is not among these archives, and holds events of this replay.")
        archived = await self._reader.rows(wanted.conditions(), low, until, limit)
        whole: list[Row] = []
        for row in merge(rows, archived, key=lambda row: row[0]):
            if not whole or whole[-1][0] != row[0]:
                whole.append(row)
        return whole[:limit]

    async def counts(self, wanted: ReplayFilter, known: Sequence[Row]) -> list[Row]:
        """Counts by (type, service, day) of events that are in archives only, beside those of the log; the inbox is not
        asked."""
        found: Counter[tuple[Any, ...]] = Counter()
        page: list[Row] = []
        if self._reader is not None:
            async for row in self._reader.walk(wanted.conditions(), 0, 2**63 - 1):
                page.append(row)
                if len(page) == _PAGE:
                    found.update(await self._removed(page))
                    page.clear()
            found.update(await self._removed(page))
        return [*known, *((*key, count, 0) for key, count in found.items())]

    async def _removed(self, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
        """(type, service, day) of those that the log does not have any more: an archive is made before they go."""
        places = [row[0] for row in rows]
        there = {row[0] for row in await self._pool.fetch(blocks("retention")["still_there"], places)}
        return [
            (
                value_of(row, "event_type"),
                value_of(row, "service_id"),
                value_of(row, "timestamp").astimezone(UTC).date(),
            )
            for row in rows
            if row[0] not in there
        ]


def _refused(message: str) -> ReplayRefused:
    return ReplayRefused(
        message, cure="name the archives (--archive PLACE), or begin later; see docs/how-to/retention.md."
    )
