"""Makes one attempt of an action or a compensation: in a transaction, outside of one, or in a thread."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any, Final

from soma_common.consumer.handlers import require_done
from soma_common.errors import OutcomeUnknown
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool
from soma_common.postgres.threads import Outcome, Threads, ThreadTx, settle
from soma_common.sagas.context import SagaContext
from soma_common.sagas.parameters import Call
from soma_common.tracing.tracer import TransactionTracer
from soma_common.tx import Tx

Append = Callable[[Sequence[Event], Any], Awaitable[Any]]
_FORKED: Final = 70  # exit code of a process that came out of an action twice


class Attempt:
    """An attempt that is under way: since when, for how long it may be, and how it is ended for good."""

    __slots__ = ("began", "cut", "timeout")

    def __init__(self, timeout: float) -> None:
        self.began, self.timeout = time.monotonic(), timeout
        self.cut: Callable[[], object] = lambda: None

    @property
    def took(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began


class Runner:
    """Calls functions of steps.

    Args:
        pool: the database in which transactional steps work.
        append: records events in a transaction.
        threads: transactions for plain functions; None: there are none among the definitions.
    """

    def __init__(self, pool: Pool, append: Append, threads: Threads | None = None) -> None:
        self._pool, self._append, self._threads = pool, append, threads
        self._tracer = TransactionTracer()

    @asynccontextmanager
    async def transaction(self, attempt: Attempt, *, blocking: bool) -> AsyncIterator[Any]:
        """The transaction of a step: it commits at the end, or rolls back."""
        if not blocking:
            async with self._pool.transaction() as connection:
                attempt.cut = connection.terminate
                yield connection
            return
        assert self._threads is not None
        async with self._threads.transaction() as tx:
            attempt.cut = tx.terminate
            yield tx

    async def call(
        self, call: Call, arguments: dict[str, Any], context: SagaContext, attempt: Attempt, connection: Any = None
    ) -> Any:
        """What the function returns; raises what it raises, and TimeoutError.

        A process that was forked inside of the function and came out of it ends: it would write into its parent's
        connections.
        """
        pid = os.getpid()
        try:
            with self._tracer.span(f"{context.saga} {context.step}", parent=context.trace):
                async with asyncio.timeout(attempt.timeout):
                    value = await self._called(call, arguments, connection)
        finally:
            if os.getpid() != pid:
                os._exit(_FORKED)
        return value

    async def _called(self, call: Call, arguments: dict[str, Any], connection: Any) -> Any:
        if not call.blocking:
            return await call.function(**arguments)
        if isinstance(connection, ThreadTx):
            value = await connection.call(call.function, **arguments)
        else:
            value = await in_thread(call.function, arguments)
        require_done(value)
        return value

    async def publish(self, tx: Tx | None, connection: Any) -> None:
        """Record what the step published."""
        if tx is not None and tx.pending:
            await self._append(tx.pending, connection)


async def in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a function in a thread of its own, a daemon: one that hangs is left behind, and keeps no process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()
    context = copy_context()

    def work() -> None:
        try:
            outcome = Outcome(context.run(function, **arguments))
        except BaseException as error:
            outcome = Outcome(None, error)
        loop.call_soon_threadsafe(settle, future, outcome)

    threading.Thread(target=work, name="soma saga step", daemon=True).start()
    return (await future).get()
