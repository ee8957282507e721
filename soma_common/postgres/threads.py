"""Threads that hold a connection each, so that plain functions can work inside of a consumer's transaction."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from soma_common.errors import DatabaseUnavailable, MissingDependency
from soma_common.postgres.errors import translated, translated_around_callers
from soma_common.postgres.pool import PoolSettings, Row, RunsStatements, borrowed

if TYPE_CHECKING:
    from soma_common.postgres.thread_connections import ThreadConnection

Connect = Callable[[], "ThreadConnection"]

_IDLE: Final = 300.0  # seconds after which a thread that has nothing to do ends
_ENDING: Final = 5.0  # seconds in which threads that have nothing to do must have closed their connections


def connecting(settings: PoolSettings, django: str | None = None) -> Connect:
    """How threads connect: by psycopg with a pool's settings, or by Django under an alias of its databases.

    Raises:
        MissingDependency: psycopg (or Django) is not installed.
        ConfigurationError: the address cannot be read, or Django has no such database on PostgreSQL.
    """
    if django is None:
        try:
            from soma_common.postgres.thread_connections import PsycopgConnection
        except ImportError as error:
            raise _missing("psycopg", "pip install 'soma-common[psycopg]', or declare handlers `async def`.") from error
        PsycopgConnection(settings)
        return lambda: PsycopgConnection(settings)
    try:
        from soma_common.postgres.django_connections import DjangoConnection, check_alias
    except ImportError as error:
        raise _missing("Django with psycopg 3", "pip install django 'soma-common[psycopg]'.") from error
    check_alias(django)
    return lambda: DjangoConnection(django)


def _missing(what: str, cure: str) -> MissingDependency:
    return MissingDependency(f"Handlers that are plain functions need {what}, which is not installed.", cure=cure)


class Outcome(NamedTuple):
    """What became of a function in a thread."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        """The function's value; raises what it raised."""
        if self.error is None:
            return self.value
        if isinstance(self.error, asyncio.CancelledError | GeneratorExit):  # here they would mean something else
            raise RuntimeError(f"It raised {type(self.error).__name__}.") from self.error
        raise self.error


class _Thread:
    """A thread with a connection of its own. It does what it is given, one after the other, until it is stopped.

    ``lost``: its connection was cut; it ends as soon as what it does ends, and gets nothing new. It is a daemon: a
    handler that hangs keeps no process alive.
    """

    def __init__(self, connection: ThreadConnection, name: str) -> None:
        self.connection = connection
        self.lost, self.rests_since = False, time.monotonic()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Outcome]:
        """Call a function in the thread, under the caller's context variables; how it ends."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        context = copy_context()

        def job() -> None:
            try:
                outcome = Outcome(context.run(function, *args))
            except BaseException as error:
                outcome = Outcome(None, error)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, future, outcome)

        self._jobs.put(job)
        return future

    def stop(self) -> asyncio.Future[Outcome]:
        """End when what was submitted is done; the connection is closed then."""
        closed = self.submit(self.connection.close)
        self._jobs.put(None)
        return closed

    def abandon(self) -> None:
        """Its connection is lost from now on, for this side and for the server."""
        self.lost = True  # before the cut: a connection that is just being made is looked at afterwards
        self.connection.cut()
        self._jobs.put(None)

    def _work(self) -> None:
        while not self.lost and (job := self._jobs.get()) is not None:
            job()
            del job  # it holds on to what the handler was given
        self.connection.close()


def settle(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    """Say how it ended, if nobody else has."""
    if not future.done():
        future.set_result(outcome)


class ThreadTx(RunsStatements):
    """A transaction on a thread's connection, as the consumer's loop sees it.

    Everything runs in the thread. When a caller is cancelled while the thread works, the connection is cut: nothing of
    the transaction commits, and its locks are free at once; the thread ends when what it does lets it.

    ``driver`` is what handlers get, once something ran. ``stopped`` tells the thread to begin nothing new.
    """

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread
        self._working: asyncio.Future[Outcome] | None = None
        self.driver: Any = None
        self.stopped = False

    def start(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Outcome]:
        """Call a function in the thread, within the transaction; it is begun with the first one.

        Raises:
            DatabaseUnavailable: the connection was cut.
        """
        if self._thread.lost:
            raise _given_up()
        self._working = self._thread.submit(self._within, function, *args)
        return self._working

    def _within(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.driver is None:
            with translated():
                self.driver = self._thread.connection.begin()
            if self._thread.lost:
                raise _given_up()
        return function(*args)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The value of a function that runs in the thread, within the transaction."""
        working = self.start(function, *args)
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            self.terminate()
            raise
        return working.result().get()

    async def fetch_rows(self, sql: str, args: Sequence[Any]) -> list[Row]:
        """All rows of one statement with ``$1`` parameters."""
        rows: list[Row] = await self.call(self._fetch, sql, args)
        return rows

    def _fetch(self, sql: str, args: Sequence[Any]) -> list[Row]:
        from soma_common.postgres.sync import fetch_sync

        return fetch_sync(self.driver, sql, args)

    def check(self) -> None:
        """In the thread: whether the transaction can still commit (see ``ThreadConnection.check``)."""
        self._thread.connection.check()

    def is_closed(self) -> bool:
        """Whether the connection was lost."""
        return self._thread.lost or self._thread.connection.is_lost()

    def interrupt(self) -> None:
        """Ask what runs in the thread to end: its statement is cancelled, and it begins no other handler."""
        self.stopped = True
        self._thread.connection.cancel()

    def terminate(self) -> None:
        """Leave the thread behind: its connection is cut, so nothing of the transaction commits."""
        self.stopped = True
        if not self._thread.lost:
            self._thread.abandon()
        if self._working is not None:
            settle(self._working, Outcome(None, _given_up()))

    async def commit(self) -> None:
        """Commit.

        Raises:
            DatabaseUnavailable: the connection was lost: nobody knows whether it committed.
        """
        await self.call(self._commit)

    def _commit(self) -> None:
        if self.stopped:
            raise _given_up()
        self.check()
        with translated_around_callers():
            self._thread.connection.commit()

    async def rollback(self) -> None:
        """Roll back; where the thread is still at work, it is left behind."""
        if self._working is not None and not self._working.done():
            self.terminate()
        if self.driver is not None and not self._thread.lost:
            with suppress(DatabaseUnavailable):
                await self.call(self._rollback)

    def _rollback(self) -> None:
        self._thread.connection.rollback()
        if self.stopped:  # a late request to cancel may still be under way: it must not meet another transaction
            self._thread.connection.close()


def _given_up() -> DatabaseUnavailable:
    return DatabaseUnavailable("The transaction was given up, and its connection was cut.")


class Threads:
    """Transactions on threads: as many threads as there are transactions at once. An idle one is used again.

    Args:
        connect: makes the connection of a new thread.
        name: of the threads, for those who look at the process.
    """

    def __init__(self, connect: Connect, name: str = "soma handlers") -> None:
        self._connect, self._name = connect, name
        self._resting: deque[_Thread] = deque()
        self.place: Sequence[Any] | None = None
        self._closed = False

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[ThreadTx]:
        """A transaction: commits at the end, rolls back on an error."""
        self._closed = False
        thread = self._resting.pop() if self._resting else self._new()
        tx = ThreadTx(thread)
        try:
            with borrowed(tx):
                try:
                    yield tx
                    await tx.commit()
                except BaseException:
                    await tx.rollback()
                    raise
        finally:
            self._give_back(thread)

    def _new(self) -> _Thread:
        connection = self._connect()
        connection.place = self.place
        return _Thread(connection, self._name)

    def _give_back(self, thread: _Thread) -> None:
        now = time.monotonic()
        if self._closed and not thread.lost:
            thread.stop()
        elif not thread.lost:
            thread.rests_since = now
            self._resting.append(thread)
        while self._resting and now - self._resting[0].rests_since > _IDLE:
            self._resting.popleft().stop()

    async def close(self) -> None:
        """End the threads that rest; one at work ends after it. Safe to call twice; used again, it begins anew."""
        self._closed = True
        closing = [thread.stop() for thread in self._resting]
        self._resting.clear()
        if closing:
            await asyncio.wait(closing, timeout=_ENDING)
