"""Takes out of the log what a verified archive holds: whole partitions in one short lock, types in small batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from soma_common.errors import ArchiveCorrupt
from soma_common.ranges import check_settings
from soma_common.retention.catalog import Archive, Catalog, Force
from soma_common.retry import Backoff

_BACKOFF: Final = Backoff(base=0.1, maximum=2.0)

Alive = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gently:
    """How gently rows go.

    Args:
        batch: most rows deleted by one transaction.
        pause: seconds of rest after each.
        lock_tries: how often the lock of a drop is tried for, 0.1 s each time, before it is left to a later run.
    """

    batch: int = 1000
    pause: float = 0.05
    lock_tries: int = 20

    def __post_init__(self) -> None:
        check_settings(self, batch=(1, 1_000_000), pause=(0.0, 3600), lock_tries=(1, 100_000))


class Remover:
    """Removes what archives hold."""

    def __init__(self, catalog: Catalog, alive: Alive, gently: Gently) -> None:
        self._catalog, self._alive, self._gently = catalog, alive, gently

    async def remove(self, archive: Archive, force: Force | None) -> str | None:
        """Remove it; None when nothing of it is left in the log, else what it waits for.

        Raises:
            ArchiveCorrupt: the log has another number of events there than the archive.
        """
        behind = await self._catalog.begin(archive, force)
        if behind:
            return f"not passed by {', '.join(behind)}"
        if archive.whole:
            return await self._drop(archive)
        await self._thin(archive)
        return None

    async def _drop(self, archive: Archive) -> str | None:
        for attempt in range(self._gently.lock_tries):
            await self._alive()
            outcome = await self._catalog.drop(archive)
            if outcome == "dropped":
                return None
            if outcome == "different":
                raise ArchiveCorrupt(
                    f"The log does not hold the {archive.events} events of {archive.location} at positions "
                    f"{archive.lower_position} to {archive.upper_position - 1}: nothing was dropped.",
                    cure="find out who changed events by hand; the archive and the partition are both there.",
                )
            await asyncio.sleep(_BACKOFF.delay(attempt))
        return "the lock of the log was not free: long transactions hold it"

    async def _thin(self, archive: Archive) -> None:
        for event_type in archive.event_types:
            after: int | None = archive.lower_position - 1
            while after is not None:
                await self._alive()
                removed, after = await self._catalog.thin(archive, event_type, after, self._gently.batch)
                if removed:
                    await asyncio.sleep(self._gently.pause)
        await self._catalog.removed(archive)
