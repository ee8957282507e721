"""Keeps what a worker has: renews leases, sees what others want, and leaves steps behind that do not end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from uuid import UUID

from soma_common.errors import InfrastructureError
from soma_common.sagas.attempts import Attempt
from soma_common.sagas.driver import Driver
from soma_common.sagas.fleet import Fleet
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.store import Claimed, SagaStore

log = logging.getLogger(__name__)

Again = Callable[[Claimed, Attempt], Coroutine[Any, Any, None]]


class Keeper:
    """Looks after the sagas of a fleet.

    Args:
        again: drives a saga on whose step was left behind.
        now: the monotonic clock.
    """

    def __init__(
        self, store: SagaStore, settings: SagaSettings, fleet: Fleet, again: Again, now: Callable[[], float]
    ) -> None:
        self._store, self._settings, self._fleet, self._again, self._now = store, settings, fleet, again, now

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.lease / 6))
            self._leave_hung()
            soon = self._now() + self._settings.lease * 2 / 3
            drivers = [d for d in self._fleet.drivers if not d.course.over and d.course.lease_ends < soon]
            try:
                await self._hold({driver.course.claimed.saga_id: driver for driver in drivers})
            except InfrastructureError as error:
                log.warning("Leases of sagas could not be renewed: %s", error)

    async def _hold(self, held: Mapping[UUID, Driver]) -> None:
        if not held:
            return
        now, claims = self._now(), [driver.course.claimed for driver in held.values()]
        seen = await self._store.hold(claims, lease=self._settings.lease)
        for was, driver in zip(claims, held.values(), strict=True):
            if was.saga_id not in seen:
                self._lose(driver, was)
            elif (what := seen[was.saga_id]) is not None:
                driver.course.lease_ends = now + self._settings.lease
                driver.see(what)

    def _lose(self, driver: Driver, was: Claimed) -> None:
        if driver.course.over or driver.course.claimed.epoch != was.epoch:
            return
        for task, running in self._fleet.pairs():
            if running is driver:
                log.info("Saga %s was taken over by another worker.", was.saga_id)
                task.cancel()

    def _leave_hung(self) -> None:
        for task, driver in self._fleet.pairs():
            hung = (a for a in driver.stepper.attempts.values() if a.took > a.timeout + self._settings.grace)
            if (attempt := next(hung, None)) is not None:
                self._leave(task, driver, attempt)

    def _leave(self, task: asyncio.Task[None], driver: Driver, attempt: Attempt) -> None:
        """The saga goes on without the task that does not end; whatever that writes later is refused."""
        claimed = driver.course.claimed
        log.error("Step %s of saga %s does not end: it is left behind.", attempt.work.path, claimed.saga_id)
        attempt.cut()
        driver.abandon()
        self._fleet.leave(task)
        self._fleet.start(self._again(claimed, attempt))
