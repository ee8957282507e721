"""Runs sagas in tests: on the real engine and a real database, with a clock, failures and crashes of the test's choice.

async with SagaTestKit(dsn, place_order) as kit:
    for crash in kit.crash_points(place_order):
        run = await kit.run(place_order, Order(...), crash)
        assert run.undone == []
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Self
from uuid import UUID

from soma_common.errors import DatabaseUnavailable, ValidationError
from soma_common.events.append import AppendSettings
from soma_common.events.models import RecordedEvent
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.threads import connecting
from soma_common.sagas.context import SagaContext
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.rig import Point, Rig
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.steps import SagaStep, SubSaga, walk
from soma_common.sagas.views import LoggedEntry, SagaView
from soma_common.sagas.worker import SagaWorker

TENANT: Final = "test"
_ENDS: Final = (SagaStatus.COMPLETED, SagaStatus.COMPENSATED, SagaStatus.STUCK)
_LEASE: Final = 60.0  # seconds of the kit's clock, which is set ahead when a worker dies
_PATIENCE: Final = 60.0  # seconds: a busy machine has its time


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens at a point of a step, or of its compensation (``undo``).

    Make one with :class:`Crash`, :class:`Failure`, :class:`Delay` or :class:`Duplicate`. ``step`` is a name or a path
    in the journal; it happens at the first ``times`` attempts that come to the point.
    """

    step: str
    point: Point = Point.AFTER_EFFECT
    undo: bool = field(default=False, kw_only=True)
    times: int = field(default=1, kw_only=True)

    def is_at(self, point: Point, context: SagaContext) -> bool:
        """Whether this is its point."""
        name = context.step.rpartition("/")[2]
        return point == self.point and context.undoing == self.undo and self.step in (name, context.step)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.point} of {'undo ' if self.undo else ''}{self.step}"


@dataclass(frozen=True, slots=True)
class Crash(Fault):
    """The worker dies there: its connections are cut, and another worker takes over."""


@dataclass(frozen=True, slots=True)
class Failure(Fault):
    """The step raises ``error`` there; before or after its effect, as the point says."""

    error: BaseException = field(default_factory=lambda: ConnectionError("injected"), kw_only=True)


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """It takes ``seconds`` of the kit's clock there."""

    seconds: float = field(default=60.0, kw_only=True)


@dataclass(frozen=True, slots=True)
class Duplicate(Fault):
    """The worker stands still there until its lease has ended and another one has brought the saga to its end; then it
    goes on, as a process does that was paused."""


@dataclass(frozen=True, slots=True)
class SagaRun:
    """How a saga went. ``calls``: attempts that came to their effect, as (key, attempt)."""

    saga: SagaView
    events: tuple[RecordedEvent, ...]
    calls: tuple[tuple[str, int], ...]
    faults: tuple[Fault, ...]

    @property
    def status(self) -> SagaStatus:
        """Where it ended."""
        return self.saga.status

    @property
    def journal(self) -> tuple[LoggedEntry, ...]:
        """What happened, in order."""
        return self.saga.journal

    @property
    def done(self) -> list[str]:
        """Paths of the steps that were done, in order."""
        return [entry.step for entry in self.journal if entry.what == "done"]

    @property
    def undone(self) -> list[str]:
        """Paths of the steps that were undone, in order."""
        return [entry.step for entry in self.journal if entry.what == "undone"]


class _MortalPool(Pool):
    """A pool whose owner can die: nothing goes through it any more. Or it stands still: nothing new goes through it
    until it goes on.
    """

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings)
        self.dead, self.goes = False, asyncio.Event()
        self.goes.set()

    def die(self) -> None:
        """Cut all connections."""
        self.dead = True
        if self._pool is not None:
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """As long as it lives."""
        await self.goes.wait()
        if self.dead:
            raise DatabaseUnavailable("The worker has died.")
        async with super().connection() as connection:
            yield connection


class _Life:
    """A worker from its start to its death."""

    def __init__(self, kit: SagaTestKit) -> None:
        self._kit = kit
        self.pool = _MortalPool(PoolSettings(kit.dsn, size=8))
        self.died = asyncio.Event()
        store = EventStore(self.pool, AppendSettings(service_id="test", route=lambda _: "test"))

        async def append(events: Any, tx: Any) -> Any:
            return await store.publish(events, tx=tx)

        blocking = any(saga.has_blocking_transactions for saga in kit.sagas)
        self.worker = SagaWorker(
            self.pool, kit.sagas, append=append, settings=SagaSettings(lease=_LEASE, poll=0.01),
            connect=connecting(self.pool.settings) if blocking else None, rig=Rig(kit.now, self._probe),
        )  # fmt: skip

    async def _probe(self, point: Point, context: SagaContext) -> None:
        await self._kit.at(point, context, self)

    async def end(self) -> None:
        """Stop it, dead or alive."""
        self.pool.goes.set()
        try:
            await self.worker.stop(patience=0.0 if self.died.is_set() else 5.0)
        except Exception:
            if not self.died.is_set():  # a dead worker cannot reach its database, and asyncpg says so in many ways
                raise
        finally:
            await self.pool.close()


class SagaTestKit:
    """Runs sagas on the real engine, in the database ``dsn`` (the fixture ``soma_database`` is one).

    The kit has a clock of its own, which :meth:`advance` sets ahead: timers, deadlines, retries and leases go by it, in
    the database as well as here. It is for one test at a time.
    """

    def __init__(self, dsn: str, *sagas: Saga) -> None:
        self.dsn, self.sagas = dsn, sagas
        self._ahead = 0.0
        self._pool = Pool(PoolSettings(dsn, size=4))
        self.orchestrator = SagaOrchestrator(self._pool, sagas)
        self._store = EventStore(self._pool, AppendSettings(service_id="test", route=lambda _: "test"))
        self._life: _Life | None = None
        self._paused: list[_Life] = []
        self._succession = asyncio.Lock()  # a worker has one successor, whoever finds out first that it needs one
        self._faults: list[Fault] = []
        self._happened: list[Fault] = []
        self._calls: list[tuple[str, int]] = []
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._set_clock()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for life in self._all():
            await life.end()
        await self.orchestrator.close()
        await self._pool.close()

    def now(self) -> float:
        """The kit's monotonic clock, in seconds."""
        return time.monotonic() + self._ahead

    async def advance(self, seconds: float | timedelta) -> None:
        """Set the clock ahead, for the database and the workers together."""
        self._ahead += seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        await self._set_clock()
        for life in self._all():
            life.pool.drop_idle()
            life.worker.wake(everything=True)

    async def _set_clock(self) -> None:
        async with self._pool.connection() as connection:
            name = await connection.fetchval("SELECT quote_ident(current_database())")
            await connection.execute(f"ALTER DATABASE {name} SET soma.clock_offset = '{self._ahead:.6f} seconds'")
        self._pool.drop_idle()

    def crash_points(self, saga: Saga) -> Iterator[Crash]:
        """A crash at every point of every step, and of every compensation."""
        for undo in (False, True):
            for step, one in _steps(saga):
                call = one.undos.get(step.name) if undo else one.calls[step.name]
                for point in Point if call is not None else ():
                    if point is not Point.BEFORE_COMMIT or (call is not None and call.transactional):
                        yield Crash(step.name, point, undo=undo)

    async def run(self, saga: Saga, given: Any, *faults: Fault, **more: Any) -> SagaRun:
        """Run a saga to its end, or until it is stuck; the clock goes as fast as it must.

        Args:
            faults: what happens on the way.
            more: as of :meth:`SagaOrchestrator.start_saga`.

        Raises:
            TimeoutError: it did not end within 30 real seconds.
            ValidationError: a fault names no step of the saga.
        """
        _check(saga, faults)
        self._faults, self._happened, self._calls, self._ended = list(_each(faults)), [], [], asyncio.Event()
        saga_id = await self.orchestrator.start_saga(saga, given, **{"tenant_id": TENANT, **more})
        async with asyncio.timeout(_PATIENCE):
            view = await self._until_ended(saga_id)
        self._ended.set()
        found = await self._store.query(tenant_id=ALL_TENANTS, correlation_id=view.correlation_id)
        return SagaRun(view, tuple(found), tuple(self._calls), tuple(self._happened))

    async def _until_ended(self, saga_id: UUID) -> SagaView:
        while True:
            async with self._succession:
                if self._life is None or self._life.died.is_set():
                    await self._next_life()
            view = await self.orchestrator.get_saga(saga_id)
            if view.status in _ENDS:
                return view
            waits = not view.has_worker and view.wake_at is not None and view.status is not SagaStatus.PENDING
            if waits and view.wake_at is not None:
                await self.advance(max(0.0, (view.wake_at - await self._db_now()).total_seconds()))
            await asyncio.sleep(0.005)

    async def _db_now(self) -> Any:
        return (await self._pool.fetch("SELECT soma.now()"))[0][0]

    async def _next_life(self) -> None:
        """Another worker, when the last one is dead: its lease is over."""
        dead, self._life = self._life, None
        if dead is not None:
            await dead.end()
            await self.advance(2 * _LEASE)
        self._life = _Life(self)
        await self._life.worker.start()

    def _all(self) -> list[_Life]:
        return [*self._paused, *([self._life] if self._life is not None else [])]

    async def at(self, point: Point, context: SagaContext, life: _Life) -> None:
        """A worker came to a point: what is to happen there happens."""
        if point is Point.BEFORE_EFFECT:
            self._calls.append((context.key, context.attempt))
        fault = next((each for each in self._faults if each.is_at(point, context)), None)
        if fault is None:
            return
        self._faults.remove(fault)
        self._happened.append(fault)
        match fault:
            case Failure():
                raise fault.error
            case Delay():
                await self.advance(fault.seconds)
            case Crash():
                life.pool.die()
                life.died.set()
                await asyncio.Event().wait()
            case Duplicate():
                await self._stand_still(life)

    async def _stand_still(self, life: _Life) -> None:
        """This worker is paused, and its lease ends; it goes on when the saga has ended."""
        async with self._succession:
            life.pool.goes.clear()
            if life is self._life:
                self._life = None
                self._paused.append(life)
            await self.advance(2 * _LEASE)
            if self._life is None:
                await self._next_life()
        await self._ended.wait()
        life.pool.goes.set()


def _check(saga: Saga, faults: Sequence[Fault]) -> None:
    names = [step.name for step, _ in _steps(saga)]
    for fault in faults:
        if not isinstance(fault, Fault) or fault.step.rpartition("/")[2] not in names:
            raise ValidationError(f"{fault} is at no step of {saga!r}.", cure=f"there are: {', '.join(names)}.")


def _each(faults: Sequence[Fault]) -> Iterator[Fault]:
    for fault in faults:
        for _ in range(fault.times):
            yield fault


def _steps(saga: Saga) -> Iterator[tuple[SagaStep, Saga]]:
    """All steps, with the definition that each stands in."""
    for part in walk(saga.parts):
        if isinstance(part, SagaStep):
            yield part, saga
        elif isinstance(part, SubSaga):
            yield from _steps(part.saga)
