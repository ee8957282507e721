"""Writes what becomes of many sagas in few statements: while one is under way, the next gathers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from soma_common.errors import LeaseLost
from soma_common.sagas.store import Record, SagaStore, Seen

_Waiting = tuple[Record, asyncio.Future[Seen]]
_MOST: Final = 200  # records of a batch


class Recorder:
    """Shares the commits of a worker's sagas."""

    def __init__(self, store: SagaStore) -> None:
        self._store = store
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(self, record: Record) -> Seen:
        """Write a record; it is durable when this returns.

        Raises:
            LeaseLost: another worker has the saga.
            DatabaseUnavailable: nobody knows whether it was written.
        """
        future: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return await future

    async def _write(self) -> None:
        try:
            while self._waiting:
                await self._one(self._next())
        finally:
            self._writing = None

    def _next(self) -> list[_Waiting]:
        """The next batch: of each saga one record, since a statement changes a row once."""
        batch: dict[UUID, _Waiting] = {}
        later: list[_Waiting] = []
        for each in self._waiting:
            saga_id = each[0].saga.saga_id
            if saga_id in batch or len(batch) == _MOST:
                later.append(each)
            else:
                batch[saga_id] = each
        self._waiting = later
        return list(batch.values())

    async def _one(self, batch: Sequence[_Waiting]) -> None:
        try:
            seen = await self._store.record([record for record, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for place, (record, future) in enumerate(batch):
            if future.done():
                continue
            if place in seen:
                future.set_result(seen[place])
            else:
                future.set_exception(lost(record))


def lost(record: Record) -> LeaseLost:
    """Another worker has the saga, or the database was set back."""
    return LeaseLost(f"Saga {record.saga.saga_id} was taken over by another worker, or set back.")
