"""Runs sagas: claims what is due, drives it, and keeps what it has."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from soma_common.errors import InfrastructureError, LeaseLost, OutcomeUnknown, SomaError
from soma_common.postgres.pool import Pool
from soma_common.postgres.threads import Connect, Threads
from soma_common.retry import Backoff
from soma_common.sagas.attempts import Append, Attempt, Runner
from soma_common.sagas.claiming import Claimer
from soma_common.sagas.course import Course
from soma_common.sagas.driver import Driver
from soma_common.sagas.fleet import Fleet
from soma_common.sagas.journal import Entry
from soma_common.sagas.keeping import Keeper
from soma_common.sagas.machine import disagreements
from soma_common.sagas.models import Saga, check_sagas
from soma_common.sagas.outcomes import Failed
from soma_common.sagas.recorder import Recorder
from soma_common.sagas.rig import REAL, Rig
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.stepping import ENDING, Parts
from soma_common.sagas.store import Claimed, SagaStore
from soma_common.sagas.tally import SagaTally
from soma_common.service import Service

log = logging.getLogger(__name__)

_SOONEST: Final = 0.002  # seconds between two looks, when there was something a moment ago
_AWAY: Final = Backoff(base=0.1, maximum=5.0)
_VAIN: Final = Backoff(base=0.01, maximum=5.0)
_LEAVING: Final = 5.0  # seconds


class SagaWorker(Service):
    """Runs sagas of the given definitions until it is stopped. Any number of workers may run beside it.

    Args:
        pool: the database of the sagas, in which their transactional steps work.
        append: records events in a transaction.
        connect: makes connections for steps that are plain functions with a transaction.
        rig: what tests hold in their hands.
    """

    def __init__(
        self, pool: Pool, sagas: Iterable[Saga], *, append: Append, settings: SagaSettings | None = None,
        connect: Connect | None = None, rig: Rig = REAL,
    ) -> None:  # fmt: skip
        super().__init__("sagas")
        self._settings = settings = settings or SagaSettings()
        self._threads = Threads(connect, "soma saga steps") if connect else None
        room = settings.transactions or max(1, pool.settings.size - 2)
        store = SagaStore(pool)
        self._store = store
        runner = Runner(pool, append, transactions=room, threads=self._threads, rig=rig)
        self._parts, self._now = Parts(store, Recorder(store), runner, rig), rig.now
        self._sagas = {saga.type_id: saga for saga in check_sagas(sagas)}
        self._fleet = Fleet(self._ended)
        self._claimer = Claimer(store, self._sagas, settings, self._fleet, rig.now)
        self._keeper = Keeper(store, settings, self._fleet, self._drive_again, rig.now)
        self._wake = asyncio.Event()
        self.tally, self.away = SagaTally(), False  # what it did; whether it waits for the database
        self._fatal: BaseException | None = None

    def wake(self, *, everything: bool = False) -> None:
        """Look for sagas that are due at once; with ``everything``, at those that wait here, too."""
        self._wake.set()
        for driver in self._fleet.drivers if everything else ():
            driver.nudge()

    @property
    def sagas(self) -> Sequence[Saga]:
        """The definitions that it runs."""
        return list(self._sagas.values())

    def driven(self) -> Counter[str]:
        """How many sagas it drives, by name."""
        return Counter(driver.saga.name for driver in self._fleet.drivers)

    def oldest(self) -> float:
        """How many seconds the oldest attempt has been at work; 0 without any."""
        return max((a.took for d in self._fleet.drivers for a in list(d.stepper.attempts.values())), default=0.0)

    async def run(self) -> None:
        """Until it is stopped, and the steps under way have ended."""
        for saga in self._sagas.values():
            await self._register(saga)
        keeping = asyncio.create_task(self._keeper.run())
        try:
            await self._claiming()
            while len(self._fleet):
                for driver in self._fleet.drivers:
                    driver.stop()
                await self._fleet.wait()
            if self._fatal is not None:
                raise self._fatal
        finally:
            keeping.cancel()
            with suppress(SomaError, TimeoutError):
                async with asyncio.timeout(_LEAVING):
                    await self._fleet.end()
                    await self._store.leave()
            if self._threads is not None:
                await self._threads.close()

    async def _register(self, saga: Saga) -> None:
        for delay in _AWAY.delays():
            try:
                first = await self._store.register(saga)
                break
            except InfrastructureError as error:
                log.warning("Sagas wait for the database: %s", error)
                if await self.pause(delay):
                    return
        if first is not None:
            log.warning("%r has another shape than when it was first seen: %s. Give it a new version.", saga, first)

    async def _claiming(self) -> None:
        idle = _SOONEST
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                got = await self._claim() if self._claimer.has_room else 0
                self.away = False
            except InfrastructureError as error:
                log.warning("Sagas wait for the database: %s", error)
                got, idle, self.away = 0, 1.0, True
            if got:
                idle = _SOONEST
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(min(idle, self._settings.poll)):
                    await self._wake.wait()
            idle = min(self._settings.poll, idle * 1.5)

    async def _claim(self) -> int:
        """Claim and begin what there is room for; how many."""
        got = 0
        for claiming in (self._claimer.silent, self._claimer.due):
            now = self._now()
            got += await self._begin(await claiming(), now)
        now = self._now()
        if (suspects := await self._claimer.suspects()) and await self._begin(suspects, now):
            await self._fleet.wait(self._settings.lease)
        return got + len(suspects)

    async def _begin(self, claimed: Sequence[Claimed], now: float) -> int:
        journals = await self._store.journals([each.saga_id for each in claimed if each.length])
        for each in claimed:
            self._fleet.start(self._drive(each, journals.get(each.saga_id, []), now + self._settings.lease))
        return len(claimed)

    def _ended(self, error: BaseException | None) -> None:
        self._wake.set()
        if isinstance(error, ENDING):
            self._fatal = self._fatal or error
            self.stopping.set()
        elif error is not None:
            log.error("A saga was dropped; it is claimed again when its lease ends.", exc_info=error)

    async def _drive(
        self, claimed: Claimed | None, entries: Sequence[Entry], lease_ends: float, hung: Attempt | None = None
    ) -> None:
        """One saga, and again from its journal whenever nobody knows what was written."""
        vain = 0  # how often nothing was written in between
        while claimed is not None:
            course = Course(
                self._sagas[claimed.type_id], claimed, entries, lease_ends=lease_ends, now=self._now, tally=self.tally
            )
            driver = Driver(self._parts, course)
            self._fleet.begins(driver)
            if self.stopping.is_set():
                driver.stop()
            try:
                if not await self._refuse(course, entries):
                    await self._settle(driver, hung)
                    await driver.run()
                return
            except LeaseLost as error:
                log.info("%s", error)
                return
            except InfrastructureError as error:
                log.warning("Saga %s is taken up again from its journal: %s", claimed.saga_id, error)
            hung, vain = None, 0 if course.journal.length > len(entries) else vain + 1
            await asyncio.sleep(_VAIN.delay(vain))
            claimed, entries, lease_ends = await self._again(course.claimed)

    async def _again(self, claimed: Claimed) -> tuple[Claimed | None, Sequence[Entry], float]:
        """The saga under a new epoch, when the database is back; None when another worker has it."""
        for delay in _AWAY.delays():
            now = self._now()
            try:
                again = await self._store.take_again(claimed, lease=self._settings.lease)
                if again is None:
                    return None, (), now
                journal = await self._store.journals([again.saga_id])
                return again, journal.get(again.saga_id, ()), now + self._settings.lease
            except InfrastructureError:
                await asyncio.sleep(delay)
        raise AssertionError

    async def _refuse(self, course: Course, entries: Sequence[Entry]) -> bool:
        """A saga that cannot be run is stuck."""
        claims, most = course.claimed.claims, 2 * self._settings.patience
        if claims > most:
            draft = course.stuck(
                "WorkerDied", f"Its workers died at it, or could not go on with it, {most} times in a row."
            )
        elif entries and (found := disagreements(course.saga, course.journal)):
            draft = course.stuck("JournalDisagrees", f"{course.saga!r} is not what it was: {'; '.join(found)}.")
        else:
            return False
        course.written(draft, await self._parts.recorder.write(draft.record))
        return True

    async def _settle(self, driver: Driver, hung: Attempt | None) -> None:
        """A step was left behind: its attempt failed, if it was not done after all."""
        if hung is None or driver.course.number(hung.work) != hung.number:
            return
        error = OutcomeUnknown(f"It did not end within {hung.timeout:g} s, nor when it was cancelled.")
        await driver.stepper.fail(hung.work, Failed(error, unknown=not hung.transactional, took=hung.took))

    async def _drive_again(self, claimed: Claimed, hung: Attempt) -> None:
        again, entries, lease_ends = await self._again(claimed)
        await self._drive(again, entries, lease_ends, hung)
