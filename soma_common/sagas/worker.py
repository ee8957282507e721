"""Runs sagas: claims what is due, drives it, and keeps what it has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from soma_common.errors import InfrastructureError, LeaseLost
from soma_common.postgres.pool import Pool
from soma_common.sagas.driver import Append, Driver, Parts
from soma_common.sagas.models import Saga
from soma_common.sagas.recorder import Recorder
from soma_common.sagas.store import Claimed, SagaStore
from soma_common.service import Service

log = logging.getLogger(__name__)


class SagaWorker(Service):
    def __init__(
        self, pool: Pool, sagas: Sequence[Saga], append: Append, at_once: int = 100, lease: float = 10.0
    ) -> None:
        super().__init__("sagas")
        store = SagaStore(pool)
        self._parts = Parts(pool, store, Recorder(store), append)
        self._sagas = sagas
        self._by_type: dict[int, Saga] = {}
        self._at_once, self._lease = at_once, lease
        self._running: dict[asyncio.Task[None], Driver] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        for saga in self._sagas:
            type_id, _ = await self._parts.store.register(saga)
            self._by_type[type_id] = saga
        idle = 0.002
        while not self.stopping.is_set():
            room = self._at_once - len(self._running)
            got: list[Claimed] = []
            if room >= max(1, self._at_once // 4):
                got = await self._claim(room)
            if got:
                idle = 0.002
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout(idle):
                    await self._wake.wait()
            except TimeoutError:
                idle = min(0.1, idle * 1.5)

    async def _claim(self, room: int) -> list[Claimed]:
        store = self._parts.store
        got = await store.claim({t: room for t in self._by_type}, lease=self._lease, patience=3)
        old = [c.saga_id for c in got if c.length]
        journals = await store.journals(old) if old else {}
        for claimed in got:
            driver = Driver(self._parts, self._by_type[claimed.type_id], claimed, journals.get(claimed.saga_id, ()))
            task = asyncio.create_task(self._drive(driver))
            self._running[task] = driver
            task.add_done_callback(self._ended)
        return got

    async def _drive(self, driver: Driver) -> None:
        try:
            await driver.run()
        except LeaseLost as error:
            log.info("%s", error)
        except InfrastructureError as error:
            log.warning("%s", error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wake.set()
        task.result()
