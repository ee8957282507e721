"""Makes one attempt of an action or a compensation: in a transaction, outside of one, or in a thread."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from typing import Any, Final

from soma_common.ambient import working_for
from soma_common.consumer.handlers import require_done
from soma_common.errors import ConfigurationError
from soma_common.events.models import Event
from soma_common.postgres.bounds import Bound, milliseconds
from soma_common.postgres.pool import Pool, fetch
from soma_common.postgres.threads import Outcome, Threads, ThreadTx, settle
from soma_common.retry import Backoff
from soma_common.sagas.context import SagaContext
from soma_common.sagas.machine import Work
from soma_common.sagas.parameters import Call
from soma_common.sagas.rig import REAL, Point, Rig
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import stepping
from soma_common.tracing.tracer import TransactionTracer
from soma_common.tx import Tx

Append = Callable[[Sequence[Event], Any], Awaitable[Any]]
"""Records events in a transaction: ``await append(events, tx)``."""
Fill = Callable[[Tx | None], dict[str, Any]]
CONFLICTED: Final = Backoff(base=0.005, maximum=0.5)
MOST_CONFLICTS: Final = 20
"""How a transaction is tried again that met another one, and how often; that is no attempt of its own."""

_MARGIN: Final = 5.0  # seconds
_GUARD: Final = blocks("readers")["guard_transaction"]
_NOTHING: Final[AbstractContextManager[Any]] = nullcontext()
_FORKED: Final = 70  # exit code of a process that came out of an action twice
_KEEP_OPEN: Final = "leave COMMIT and ROLLBACK to the saga; undo by savepoints."


class Attempt:
    """An attempt that is under way: since when, for how long it may be, and how it is ended for good.

    ``transactional``: its effects are in a transaction, which ``cut`` ends.
    """

    __slots__ = ("_began", "_scope", "cut", "number", "timeout", "transactional", "work")

    def __init__(self, work: Work, number: int, timeout: float) -> None:
        self.work, self.number, self.timeout = work, number, timeout
        self.transactional = False
        self._began: float | None = None
        self.cut: Callable[[], object] = lambda: None
        self._scope: asyncio.Timeout | None = None

    def scope(self) -> asyncio.Timeout:
        """The time in which the function must return."""
        self._scope = asyncio.timeout(self.timeout)
        return self._scope

    def interrupt(self) -> None:
        """End it as if its time were up."""
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    @property
    def took(self) -> float:
        """Seconds so far; none while it waits for a connection."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def begin(self, transaction: Any = None) -> None:
        """It has what it needs."""
        self._began = time.monotonic()
        if transaction is not None:
            self.cut, self.transactional = transaction.terminate, True


class StepRaised(Exception):
    """What the function of a step raised, told apart from what the library raises around it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(str(type(error).__name__))


class Runner:
    """Calls functions of steps.

    Args:
        pool: the database in which transactional steps work.
        append: records events in a transaction.
        transactions: how many may be open at once.
        threads: transactions for plain functions; None: there are none among the definitions.
    """

    def __init__(
        self, pool: Pool, append: Append, *, transactions: int, threads: Threads | None = None, rig: Rig = REAL
    ) -> None:
        self._pool, self._append, self._threads, self._probe = pool, append, threads, rig.probe
        self._room = asyncio.Semaphore(transactions)
        self._tracer = TransactionTracer()

    @asynccontextmanager
    async def transaction(self, attempt: Attempt, *, blocking: bool) -> AsyncIterator[Any]:
        """The transaction of a step: it commits at the end, or rolls back.

        PostgreSQL ends it a little later than the attempt itself would: a worker that is paused, or whose machine is
        gone without a word, must not keep the locks for which another worker's attempt waits.
        """
        most = attempt.timeout + _MARGIN
        async with self._room:
            if not blocking:
                async with self._pool.transaction(bound=Bound(most, most)) as connection:
                    attempt.begin(connection)
                    yield connection
                return
            assert self._threads is not None
            async with self._threads.transaction() as tx:
                await fetch(tx, _GUARD, (milliseconds(most), milliseconds(most)))
                attempt.begin(tx)
                yield tx

    async def call(self, call: Call, fill: Fill, context: SagaContext, attempt: Attempt, connection: Any = None) -> Any:
        """What the function returns; what it published is recorded.

        ``fill`` makes its arguments, from the transaction where there is one. A process that was forked inside of the
        function and came out of it ends: it would write into its parent's connections.

        Raises:
            StepRaised: what it raised, and TimeoutError.
        """
        try:
            with self._shown(context), working_for(context):
                async with attempt.scope():
                    if call.blocking:
                        return await self._in_thread(call, fill, context, connection)
                    return await self._called(call, fill, context, connection)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise StepRaised(error) from error
        except BaseException as error:
            raise StepRaised(error) from error

    def _shown(self, context: SagaContext) -> AbstractContextManager[Any]:
        """The attempt's span; without a provider nothing, for the context has the trace."""
        if not self._tracer.active:
            return _NOTHING
        return self._tracer.doing(stepping(context), parent=context.trace)

    async def _called(self, call: Call, fill: Fill, context: SagaContext, connection: Any) -> Any:
        tx = Tx(connection) if call.transactional else None
        await self._probe(Point.BEFORE_EFFECT, context)
        pid = os.getpid()
        try:
            value = await call.function(**fill(tx))
        finally:
            _end_fork(pid)
        require_done(value)
        await self._probe(Point.AFTER_EFFECT, context)
        if tx is not None:
            if not connection.is_in_transaction():
                raise ConfigurationError("The step ended its transaction.", cure=_KEEP_OPEN)
            await self._publish(tx, connection, context)
        return value

    async def _in_thread(self, call: Call, fill: Fill, context: SagaContext, connection: ThreadTx | None) -> Any:
        await self._probe(Point.BEFORE_EFFECT, context)
        if connection is None:
            value = await in_thread(lambda: call.function(**fill(None)))
            require_done(value)
            await self._probe(Point.AFTER_EFFECT, context)
            return value
        made: list[Tx] = []

        def work() -> Any:
            made.append(Tx(connection.driver))
            value = call.function(**fill(made[0]))
            require_done(value)
            connection.check()
            return value

        value = await connection.call(_unforked, work)
        await self._probe(Point.AFTER_EFFECT, context)
        await self._publish(made[0], connection, context)
        return value

    async def _publish(self, tx: Tx, connection: Any, context: SagaContext) -> None:
        if tx.pending:
            await self.publish(tx.pending, connection, context)

    async def publish(self, events: Sequence[Event], connection: Any, context: SagaContext) -> None:
        """Record events of a saga in a transaction."""
        trace = self._tracer.current() or context.trace
        await self._append([_of_saga(event, context, trace) for event in events], connection)


def _of_saga(event: Event, context: SagaContext, trace: TraceContext | None) -> Event:
    """What an event leaves open is the saga's."""
    open_correlation = event.correlation_id == str(event.event_id)
    return replace(
        event,
        causation_id=event.causation_id or context.key,
        correlation_id=context.correlation_id if open_correlation else event.correlation_id,
        trace=event.trace or trace,
    )


async def in_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread of its own, a daemon: one that hangs is left behind, and keeps no process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()
    context = copy_context()

    def work() -> None:
        try:
            outcome = Outcome(context.run(_unforked, function))
        except BaseException as error:
            outcome = Outcome(None, error)
        loop.call_soon_threadsafe(settle, future, outcome)

    threading.Thread(target=work, name="soma saga step", daemon=True).start()
    return (await future).get()


def _unforked(function: Callable[[], Any]) -> Any:
    """Call a function; a process that was forked inside of it and comes out of it ends here."""
    pid = os.getpid()
    try:
        return function()
    finally:
        _end_fork(pid)


def _end_fork(pid: int) -> None:
    if os.getpid() != pid:
        os._exit(_FORKED)
