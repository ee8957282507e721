"""Runs sagas: claims what is due, drives it, and keeps what it has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from soma_common.errors import InfrastructureError, LeaseLost, OutcomeUnknown, SomaError
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool
from soma_common.postgres.threads import Connect, Threads
from soma_common.retry import Backoff
from soma_common.sagas.attempts import Attempt, Runner
from soma_common.sagas.course import Course
from soma_common.sagas.driver import Driver
from soma_common.sagas.journal import Entry
from soma_common.sagas.machine import disagreements
from soma_common.sagas.models import Saga, check_sagas
from soma_common.sagas.outcomes import Failed
from soma_common.sagas.recorder import Recorder
from soma_common.sagas.rig import REAL, Rig
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.stepping import ENDING, Parts
from soma_common.sagas.store import Claimed, SagaStore
from soma_common.service import Service

log = logging.getLogger(__name__)

Append = Callable[[Sequence[Event], Any], Awaitable[Any]]
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
        self._running: dict[asyncio.Task[None], Driver | None] = {}
        self._left: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._looked = 0.0
        self._fatal: BaseException | None = None

    def wake(self, *, everything: bool = False) -> None:
        """Look for sagas that are due at once; with ``everything``, at those that wait here, too."""
        self._wake.set()
        for driver in filter(None, self._running.values() if everything else ()):
            driver.nudge()

    async def run(self) -> None:
        """Until it is stopped, and the steps under way have ended."""
        for saga in self._sagas.values():
            await self._register(saga)
        keeping = asyncio.create_task(self._keep())
        try:
            await self._claiming()
            for driver in filter(None, self._running.values()):
                driver.stop()
            while self._running:
                await asyncio.wait(self._running)
            if self._fatal is not None:
                raise self._fatal
        finally:
            keeping.cancel()
            for task in (*self._running, *self._left):
                task.cancel()
            with suppress(SomaError, TimeoutError):
                async with asyncio.timeout(_LEAVING):
                    await asyncio.gather(*self._running, return_exceptions=True)
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

    # Claiming.

    async def _claiming(self) -> None:
        idle = _SOONEST
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                got = await self._claim() if self._has_room else 0
            except InfrastructureError as error:
                log.warning("Sagas wait for the database: %s", error)
                got, idle = 0, 1.0
            if got:
                idle = _SOONEST
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(min(idle, self._settings.poll)):
                    await self._wake.wait()
            idle = min(self._settings.poll, idle * 1.5)

    @property
    def _has_room(self) -> bool:
        """Claims come in batches: one per saga that ended would cost as much as its steps."""
        return len(self._running) <= self._settings.at_once * 3 // 4

    async def _claim(self) -> int:
        """Sagas whose owners fell silent come first: what is due would else leave no room for them, for as long as
        there is more of it than the workers can do."""
        lease, now = self._settings.lease, self._now()
        looks = now - self._looked > lease / 10
        got = 0
        if looks:
            self._looked = now
            room = self._settings.at_once - len(self._running)
            got += await self._begin(
                await self._store.take_over(self._sagas, room, lease=lease, patience=self._settings.patience), now
            )
        got += await self._claim_due(lease)
        if looks:
            got += await self._claim_suspect()
        return got

    async def _claim_due(self, lease: float) -> int:
        """Every type has an equal share of what is free; what one leaves over is for all."""
        now, rooms = self._now(), self._rooms()
        free = self._settings.at_once - len(self._running)
        share = -(-free // max(1, len(rooms)))
        claimed = await self._store.claim({t: min(share, room) for t, room in rooms.items()}, lease=lease)
        return await self._begin(claimed, now)

    def _rooms(self) -> dict[int, int]:
        """How many sagas of each type may be claimed."""
        free, limits = self._settings.at_once - len(self._running), self._settings.of_type
        rooms = {}
        for type_id, saga in self._sagas.items():
            room = min(free, limits.get(saga.name, free))
            if saga.name in limits:
                room = min(room, limits[saga.name] - sum(1 for d in self._running.values() if d and d.saga is saga))
            if room > 0:
                rooms[type_id] = room
        return rooms

    async def _claim_suspect(self) -> int:
        """A saga that was claimed again and again without progress may kill its worker: it runs alone."""
        settings = self._settings
        if not await self._store.any_suspects(self._sagas, settings.patience):
            return 0
        if self._running:
            await asyncio.wait(self._running, timeout=settings.lease)
            if self._running:
                return 0  # others are busy, or too long at it: next time
        now = self._now()
        got = await self._store.take_over(
            self._sagas, 1, lease=settings.lease, patience=settings.patience, suspects=True
        )
        if await self._begin(got, now):
            await asyncio.wait(self._running, timeout=settings.lease)
        return len(got)

    async def _begin(self, claimed: Sequence[Claimed], now: float) -> int:
        journals = await self._store.journals([each.saga_id for each in claimed if each.length])
        for each in claimed:
            self._start(self._drive(each, journals.get(each.saga_id, []), now + self._settings.lease))
        return len(claimed)

    # Driving.

    def _start(self, driving: Any) -> None:
        task = asyncio.create_task(driving)
        self._running[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._left.discard(task)
        self._wake.set()
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, ENDING):
            self._fatal = self._fatal or error
            self.stopping.set()
        else:
            log.error("A saga was dropped; it is claimed again when its lease ends.", exc_info=error)

    async def _drive(
        self, claimed: Claimed | None, entries: Sequence[Entry], lease_ends: float, hung: Attempt | None = None
    ) -> None:
        """One saga, and again from its journal whenever nobody knows what was written."""
        vain = 0  # how often nothing was written in between
        while claimed is not None:
            course = Course(self._sagas[claimed.type_id], claimed, entries, lease_ends=lease_ends, now=self._now)
            driver = Driver(self._parts, course)
            task = asyncio.current_task()
            assert task is not None
            if task in self._running:
                self._running[task] = driver
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

    # Keeping.

    async def _keep(self) -> None:
        """Renew leases, see what others want, and leave steps behind that do not end."""
        lease = self._settings.lease
        while True:
            await asyncio.sleep(min(1.0, lease / 6))
            self._leave_hung()
            held = {d.course.claimed.saga_id: d for d in self._running.values() if d and not d.course.over}
            soon = self._now() + lease * 2 / 3
            late = {saga_id: driver for saga_id, driver in held.items() if driver.course.lease_ends < soon}
            if not late:
                continue
            try:
                await self._hold(late)
            except InfrastructureError as error:
                log.warning("Leases of sagas could not be renewed: %s", error)

    async def _hold(self, held: Mapping[UUID, Driver]) -> None:
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
        for task, running in self._running.items():
            if running is driver:
                log.info("Saga %s was taken over by another worker.", was.saga_id)
                task.cancel()

    def _leave_hung(self) -> None:
        for task, driver in list(self._running.items()):
            for attempt in list(driver.stepper.attempts.values()) if driver else ():
                if driver is not None and attempt.took > attempt.timeout + self._settings.grace:
                    self._leave(task, driver, attempt)
                    break

    def _leave(self, task: asyncio.Task[None], driver: Driver, attempt: Attempt) -> None:
        """The saga goes on without the task that does not end; whatever that writes later is refused."""
        claimed = driver.course.claimed
        log.error("Step %s of saga %s does not end: it is left behind.", attempt.work.path, claimed.saga_id)
        attempt.cut()
        driver.abandon()
        del self._running[task]
        self._left.add(task)
        task.cancel()
        self._start(self._drive_again(claimed, attempt))

    async def _drive_again(self, claimed: Claimed, hung: Attempt) -> None:
        again, entries, lease_ends = await self._again(claimed)
        await self._drive(again, entries, lease_ends, hung)
