"""Waits for the ends of sagas: one question to the database for all that wait in this process."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from soma_common.errors import InfrastructureError
from soma_common.postgres.pool import Pool, Row
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)
_SQL: Final = blocks("sagas")
_SOONEST, _LATEST = 0.002, 0.1  # seconds between two questions


class Ends:
    """The ends of sagas, as they come."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[UUID, set[asyncio.Future[Row]]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def of(self, saga_id: UUID) -> Row:
        """The end of a saga (block ``ends``), once it has one."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(saga_id, set())
        waiting.add(future)
        self._wake.set()
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            end: Row = await future
            return end
        finally:
            waiting.discard(future)
            if not waiting and self._waiting.get(saga_id) is waiting:
                del self._waiting[saga_id]

    def wake(self) -> None:
        """A saga may have ended: ask at once."""
        self._wake.set()

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self) -> None:
        idle = _SOONEST
        try:
            while self._waiting:
                self._wake.clear()
                idle = _SOONEST if await self._ask_once() else min(_LATEST, idle * 1.5)
                with suppress(TimeoutError):
                    async with asyncio.timeout(idle):
                        await self._wake.wait()
                        idle = _SOONEST
        finally:
            self._asking = None

    async def _ask_once(self) -> int:
        try:
            rows = await self._pool.fetch(_SQL["ends"], list(self._waiting))
        except InfrastructureError as error:
            log.warning("Ends of sagas cannot be looked for: %s", error)
            await asyncio.sleep(1.0)
            return 0
        for row in rows:
            for future in self._waiting.get(UUID(int=row[0].int), ()):
                if not future.done():
                    future.set_result(row)
        return len(rows)
