"""Connections to PostgreSQL by asyncpg, and one way to call SQL on asyncpg's and psycopg's."""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from soma_common.errors import ConfigurationError
from soma_common.postgres.arrays import literals
from soma_common.postgres.bounds import Bound
from soma_common.postgres.errors import translated, translated_around_callers
from soma_common.ranges import check_settings
from soma_common.retry import Backoff

if TYPE_CHECKING:
    import asyncpg

log = logging.getLogger(__name__)

# Seconds. A peer that vanished without a word is noticed by the kernel; PostgreSQL itself may take its time.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_UNHEARD = 30

Row = Sequence[Any]


class Tx(Protocol):
    """A connection with an open transaction, as handlers get it: asyncpg's methods with ``$1`` parameters."""

    async def execute(self, query: str, *args: Any) -> str:
        """Run a statement; the command tag."""

    async def executemany(self, command: str, args: Any) -> None:
        """Run a statement once per tuple of arguments."""

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        """All rows."""

    async def fetchrow(self, query: str, *args: Any) -> Any:
        """The first row or None."""

    async def fetchval(self, query: str, *args: Any) -> Any:
        """The first column of the first row."""

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """A savepoint: ``async with tx.transaction():``."""


class RunsStatements(ABC):
    """A transaction that is no driver's connection, and runs the library's statements in its own way."""

    @abstractmethod
    async def fetch_rows(self, sql: str, args: Sequence[Any]) -> list[Row]:
        """All rows of one statement with ``$1`` parameters; raises the library's errors."""


def is_asyncpg(connection: object) -> bool:
    """Whether this is an asyncpg connection (or a pool's proxy of one), told without importing asyncpg."""
    return type(connection).__module__.partition(".")[0] == "asyncpg"


async def fetch(connection: Any, sql: str, args: Sequence[Any]) -> list[Row]:
    """All rows of one statement with ``$1`` parameters, on an asyncpg or an async psycopg connection, or a thread's."""
    with translated():
        if is_asyncpg(connection):
            rows: list[Row] = await connection.fetch(sql, *args)
            return rows
        if isinstance(connection, RunsStatements):
            return await connection.fetch_rows(sql, args)
        import psycopg

        # Not closed: a cursor of the client's side holds nothing.
        cursor = psycopg.AsyncRawCursor(connection, row_factory=psycopg.rows.tuple_row)
        await cursor.execute(sql, literals(args))
        found: list[Any] = await cursor.fetchall() if cursor.description else []
        return found


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How to connect. ``size`` is the most connections at once; ``timeout`` (seconds) bounds connecting."""

    dsn: str
    size: int = 10
    timeout: float = 10.0
    transaction_pooler: bool = False
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self, dsn=str, size=(1, 10_000), timeout=(0.01, 86_400), settings=dict)


class Lent:
    """The connections that were taken inside of a ``lending`` block and not given back yet."""

    def __init__(self) -> None:
        self._connections: set[Any] = set()

    def add(self, connection: Any) -> None:
        """It was taken."""
        self._connections.add(connection)

    def discard(self, connection: Any) -> None:
        """It was given back."""
        self._connections.discard(connection)

    def hang_up(self) -> int:
        """End them all at once, whatever they wait for; how many there were.

        Whoever waits for an answer gets DatabaseUnavailable. Cancelling would not do: a cancelled statement still waits
        for the server.
        """
        import asyncpg

        connections = list(self._connections)
        for connection in connections:
            with suppress(asyncpg.InterfaceError):  # given back this very moment
                connection.terminate()
        return len(connections)


_LENT: ContextVar[Lent | None] = ContextVar("soma_lent", default=None)


@contextmanager
def lending() -> Iterator[Lent]:
    """Keeps track of the connections that this block, and the tasks it starts, take from any pool."""
    lent = Lent()
    token = _LENT.set(lent)
    try:
        yield lent
    finally:
        _LENT.reset(token)


@contextmanager
def borrowed(connection: Any) -> Iterator[None]:
    """A connection that is no pool's is at work; it has asyncpg's ``terminate``."""
    lent = _LENT.get()
    if lent is not None:
        lent.add(connection)
    try:
        yield
    finally:
        if lent is not None:
            lent.discard(connection)


class Pool:
    """A pool of asyncpg connections that hands out the library's errors.

    Connections are taken lazily: a database that is away is an error of the first use, not of the start.
    """

    def __init__(self, settings: PoolSettings | str) -> None:
        self.settings = PoolSettings(settings) if isinstance(settings, str) else settings
        self._pool: asyncpg.Pool[Any] | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> Pool:
        """Make the pool; safe to call twice."""
        async with self._opening:
            if self._pool is None:
                self._pool = await _make_pool(self.settings)
        return self

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    def drop_idle(self) -> None:
        """End the connections that nobody uses now: some may be dead without knowing it.

        asyncpg's own way, ``expire_connections``, says goodbye to each, and a dead one does not answer that either.
        """
        for holder in self._pool._holders if self._pool is not None else ():
            if holder._in_use is None and holder._con is not None:
                holder._con.terminate()

    async def __aenter__(self) -> Pool:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def counts(self) -> tuple[int, int]:
        """How many connections are open, and how many of them nobody uses."""
        return (0, 0) if self._pool is None else (self._pool.get_size(), self._pool.get_idle_size())

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        """A connection in autocommit; back in the pool at the end.

        Errors of the server become the library's; what else is raised inside stays as it is.
        """
        if self._pool is None:
            await self.open()
        assert self._pool is not None
        pool = self._pool
        with translated():
            connection = await pool.acquire(timeout=self.settings.timeout)
        lent = _LENT.get()
        if lent is not None:
            lent.add(connection)
        with translated_around_callers():
            try:
                yield connection
            finally:
                try:
                    await pool.release(connection)
                except Exception as error:  # it was ended; what the block came to counts
                    log.debug("A connection was lost when it was given back: %r", error)
                finally:
                    if lent is not None:
                        lent.discard(connection)

    @asynccontextmanager
    async def transaction(self, *, bound: Bound | None = None) -> AsyncIterator[asyncpg.Connection[Any]]:
        """A connection inside a READ COMMITTED transaction: commits at the end, rolls back on an error.

        Args:
            bound: PostgreSQL ends the transaction after that, and the commit waits for the disk even where the
                session's default does not. A paused process would else keep its locks, and nobody could take over
                what it had. The library's own transactions are ``SHORT``.

        Raises:
            DatabaseUnavailable: PostgreSQL ended it so; it is rolled back.
        """
        async with self.connection() as connection, in_transaction(connection, bound):
            yield connection

    async def fetch(self, sql: str, *args: Any) -> list[Row]:
        """All rows of one statement, in a transaction of its own."""
        async with self.connection() as connection:
            return await fetch(connection, sql, args)

    async def fetch_planned(self, sql: str, *args: Any) -> list[Row]:
        """All rows of one statement, planned for these very values.

        A statement that is used often gets a generic plan, which guesses what a LIMIT and a filter will find, and may
        walk the whole log for it.
        """
        if self.settings.transaction_pooler:  # prepares nothing that lasts
            return await self.fetch(sql, *args)
        async with self.connection() as connection:
            with translated():
                statement = await connection.prepare(sql)
                rows: list[Row] = await statement.fetch(*args)
                return rows

    async def wait_until_up(self, patience: float) -> None:
        """Wait until the database answers, at most ``patience`` seconds.

        Raises:
            DatabaseUnavailable: it did not answer in time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        for delay in Backoff(base=0.05, maximum=1.0).delays():
            try:
                await self.fetch("SELECT 1")
                return
            except Exception:
                if loop.time() + delay > end:
                    raise
            await asyncio.sleep(delay)


async def _make_pool(settings: PoolSettings) -> asyncpg.Pool[Any]:
    import asyncpg

    server_settings = {"application_name": "soma-common", **settings.settings}
    try:
        return await asyncpg.create_pool(
            settings.dsn,
            min_size=0,
            max_size=settings.size,
            timeout=settings.timeout,
            server_settings=server_settings,
            statement_cache_size=0 if settings.transaction_pooler else 200,
            # The default reset would double the round trips of a one-statement use.
            reset=_no_reset,
            init=_notice_silence,
        )
    except (ValueError, asyncpg.exceptions.ClientConfigurationError) as error:
        raise ConfigurationError(
            f"The PostgreSQL address cannot be read: {error}.",
            cure="set SOMASTACK_POSTGRES_DSN to postgresql://user:password@host:5432/database.",
        ) from error


@asynccontextmanager
async def in_transaction(connection: Any, bound: Bound | None = None) -> AsyncIterator[None]:
    """A READ COMMITTED transaction of an asyncpg connection; with a bound, PostgreSQL ends it (see ``transaction``).

    What is cancelled stays cancelled, though the connection is lost at the same time: asyncpg would raise an error
    about the connection instead, and whoever waits until the database is back would not hear that it is to end.
    """
    cancelled: asyncio.CancelledError | None = None
    try:
        async with _transaction(connection, bound):
            try:
                yield
            except asyncio.CancelledError as error:
                cancelled = error
                raise
    except Exception:
        if cancelled is not None:
            raise cancelled from None
        raise


def _transaction(connection: Any, bound: Bound | None) -> Any:
    if bound is None:
        return connection.transaction(isolation="read_committed")
    from soma_common.postgres.bounded import BoundedTransaction

    return BoundedTransaction(connection, bound)


async def _no_reset(connection: Any) -> None:
    """Every use of the pool ends its transaction itself and sets nothing that outlives it."""


async def _notice_silence(connection: Any) -> None:
    """Let the kernel end a connection whose other side is gone: asyncpg would wait for it for ever."""
    sock = connection._transport.get_extra_info("socket")
    if sock is not None:
        notice_silence(sock)


def notice_silence(sock: socket.socket) -> None:
    """Let the kernel end a connection whose other side is gone."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = [*_KEEPALIVE.items(), ("TCP_USER_TIMEOUT", _UNHEARD * 1000)]
    for name, value in wanted:
        with suppress(AttributeError, OSError):  # not every system has them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
