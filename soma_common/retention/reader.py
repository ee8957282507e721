"""Reads archives back: the same events, by the same filters, with every file checked before anything of it is used."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from soma_common.errors import ArchiveCorrupt, RetentionError, ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.events.store import MAX_LIMIT, EventFilter, Page
from soma_common.retention.exporting import read_file, read_manifest
from soma_common.retention.format import Row, event_of, value_of
from soma_common.retention.manifest import NAME, ArchivedFile, Manifest
from soma_common.retention.storage import Storage

_LAST: Final = 2**63 - 1
_KEPT: Final = 3  # decoded files


@dataclass(frozen=True, slots=True)
class Found:
    """An archive in a storage, where, and the SHA-256 of its manifest."""

    location: str
    manifest: Manifest
    digest: str


class ArchiveReader:
    """The archives of one log in a storage; needs no database.

    Args:
        log_id: whose archives; needed only where several logs share a storage.
    """

    def __init__(self, storage: Storage, *, log_id: UUID | None = None) -> None:
        self.storage, self.log_id = storage, log_id
        self._found: tuple[Found, ...] | None = None
        self._kept: dict[tuple[str, str], list[Row]] = {}

    async def archives(self, *, again: bool = False) -> tuple[Found, ...]:
        """What is there, by position; looked up once, or ``again``. Folders without a manifest are passed over.

        Raises:
            ArchiveUnavailable: the storage cannot be read.
            ArchiveCorrupt: a manifest was changed, or is none.
            RetentionError: there are archives of several logs.
        """
        if self._found is None or again:
            below = "" if self.log_id is None else str(self.log_id)
            names = await asyncio.to_thread(self.storage.names, f"/{NAME}", below)
            found = [await self._manifest(name.removesuffix(f"/{NAME}")) for name in names]
            logs = {each.manifest.log_id for each in found}
            if len(logs) > 1:
                known = ", ".join(sorted(map(str, logs)))
                raise RetentionError(
                    f"{self.storage.uri} holds archives of {len(logs)} logs.",
                    cure=f"name the folder of one of them in it: {known}.",
                )
            self._found = tuple(sorted(found, key=lambda each: (each.manifest.lower_position, each.location)))
        return self._found

    async def _manifest(self, location: str) -> Found:
        try:
            manifest, digest = await read_manifest(self.storage, location)
        except ArchiveCorrupt as error:
            raise ArchiveCorrupt(f"{location}: {error.message}", cure=error.cure) from error
        return Found(location, manifest, digest)

    async def query(
        self, wanted: EventFilter, *, limit: int = 100, after: int | None = None, newest_first: bool = False
    ) -> Page:  # fmt: skip
        """A page of events, as :meth:`EventStore.query` gives it.

        Raises:
            ValidationError: a limit outside 1..10000.
            ArchiveUnavailable, ArchiveCorrupt: a file that is needed is not what it should be.
        """
        if not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
            raise ValidationError(f"limit is {limit!r:.80}.", cure=f"use 1 to {MAX_LIMIT}.")
        low, high = (0, _LAST) if after is None else (0, after - 1) if newest_first else (after, _LAST)
        rows = await self.rows(wanted.conditions(), low, high, limit + 1, newest_first=newest_first)
        events = tuple(map(event_of, rows[:limit]))
        return Page(events, events[-1].position if len(rows) > limit else None)

    async def events(self, wanted: EventFilter, *, after: int = 0) -> AsyncIterator[RecordedEvent]:
        """All events of a filter, by position."""
        async for row in self.walk(wanted.conditions(), after, _LAST):
            yield event_of(row)

    def walk(
        self, conditions: Mapping[str, Any], low: int, high: int, *, only: Collection[str] | None = None
    ) -> AsyncIterator[Row]:
        """The same as rows, in the columns of the log's SELECT, above one position and up to another.

        ``only``: the places of the archives that count; None: all.
        """
        return self._walk(_test(conditions), conditions, low, high, 1, only)

    async def rows(
        self, conditions: Mapping[str, Any], low: int, high: int, limit: int, *, newest_first: bool = False,
        only: Collection[str] | None = None,
    ) -> list[Row]:  # fmt: skip
        """Rows above one position and up to another, at most ``limit``, in the columns of the log's SELECT."""
        found: list[Row] = []
        async for row in self._walk(_test(conditions), conditions, low, high, -1 if newest_first else 1, only):
            found.append(row)
            if len(found) == limit:
                break
        return found

    async def spans(self, conditions: Mapping[str, Any], only: Collection[str]) -> list[tuple[int, int]]:
        """First and last positions of the files in which events of a filter may be, of the archives at some places."""
        kind = conditions.get("event_type")
        return [
            (file.first_position, file.last_position)
            for found in await self.archives()
            if found.location in only and (kind is None or kind in found.manifest.counts)
            for file in found.manifest.files
            if _overlaps(file, conditions, 0, _LAST)
        ]

    async def _walk(
        self, fits: Callable[[Row], bool], conditions: Mapping[str, Any], low: int, high: int, step: int,
        only: Collection[str] | None,
    ) -> AsyncIterator[Row]:  # fmt: skip
        """Rows in order. Archives of one partition are merged; what two of them hold comes once."""
        groups: dict[int, list[Found]] = {}
        for each in (await self.archives())[::step]:
            if only is None or each.location in only:
                groups.setdefault(each.manifest.lower_position, []).append(each)
        for group in groups.values():
            last = None
            async for row in _merged([self._of(each, conditions, low, high, step) for each in group], step):
                if row[0] != last and fits(row):
                    yield row
                last = row[0]

    async def _of(
        self, found: Found, conditions: Mapping[str, Any], low: int, high: int, step: int
    ) -> AsyncIterator[Row]:  # fmt: skip
        if (kind := conditions.get("event_type")) is not None and kind not in found.manifest.counts:
            return
        for file in found.manifest.files[::step]:
            if _overlaps(file, conditions, low, high):
                for row in (await self._file(found.location, file))[::step]:
                    if low < row[0] <= high:
                        yield row

    async def _file(self, location: str, file: ArchivedFile) -> list[Row]:
        """The rows of a file. The last few are kept: pages of a replay are smaller than files."""
        name = location, file.name
        rows = self._kept.pop(name, None) or await read_file(self.storage, location, file)
        self._kept[name] = rows
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return rows


async def _merged(sources: Sequence[AsyncIterator[Row]], step: int) -> AsyncIterator[Row]:
    """Rows of several ordered sources as one."""
    heap: list[tuple[int, int, Row]] = []
    for number, source in enumerate(sources):
        if (first := await anext(source, None)) is not None:
            heap.append((first[0] * step, number, first))
    heapq.heapify(heap)
    while heap:
        _, number, row = heap[0]
        yield row
        following = await anext(sources[number], None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (following[0] * step, number, following))


def _overlaps(file: ArchivedFile, conditions: Mapping[str, Any], low: int, high: int) -> bool:
    since: datetime | None = conditions.get("since")
    until: datetime | None = conditions.get("until")
    return (
        file.last_position > low
        and file.first_position <= high
        and (since is None or file.last_timestamp >= since)
        and (until is None or file.first_timestamp < until)
    )


def _test(conditions: Mapping[str, Any]) -> Callable[[Row], bool]:
    """Whether a row meets conditions, as the database would decide it."""
    exact = {name: value for name, value in conditions.items() if name not in ("since", "until")}
    since, until = conditions.get("since"), conditions.get("until")

    def fits(row: Row) -> bool:
        stamp = value_of(row, "timestamp")
        if (since is not None and stamp < since) or (until is not None and stamp >= until):
            return False
        return all(value_of(row, name) == value for name, value in exact.items())

    return fits
