"""A transaction as a block: writes, events and the scopes inside of it commit together, or not at all.

async with soma.transaction() as tx:
    await tx.conn.execute("INSERT INTO orders VALUES ($1)", order.id)
    tx.publish(Event(...))
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any

from soma_common.errors import (
    CommitUnknown,
    ConfigurationError,
    DatabaseUnavailable,
    TransactionDoomed,
    TransactionError,
)
from soma_common.events.append import Published, Spans
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import fetch, in_transaction
from soma_common.scopes import Mode, Scope, check_mode, innermost, noticing_failures
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx


class TransactionScope:
    """A block in a transaction: it commits at the end, and rolls back on an error. What ``tx.publish`` was given is
    recorded in one statement just before COMMIT.

    Modes say what it is inside of an open scope of the same task on the same pool:

    - ``join`` takes part: one transaction. When the block fails the whole transaction does; whoever swallows the error
      meets ``TransactionDoomed`` at COMMIT.
    - ``savepoint`` takes part, and is rolled back alone when the block fails; its events are dropped then.
    - ``new`` is a transaction of its own, on another connection.

    Outside of one, each is a transaction of its own (READ COMMITTED). A task started inside of a scope is outside.

    Args:
        store: where events are recorded; ``soma.transaction()`` gives the application's.
        trace: what events that have no trace join where no span is current.

    Raises:
        TransactionDoomed: nothing was committed, for an error inside was swallowed.
        TransactionConflict: run the whole block again.
        DatabaseUnavailable: nothing was committed.
        CommitUnknown: the connection was lost at COMMIT, and how it ended cannot be told.
    """

    def __init__(self, store: EventStore, *, mode: Mode = "join", trace: TraceContext | None = None) -> None:
        if not isinstance(store, EventStore):
            raise ConfigurationError(
                f"A {type(store).__name__} is no event store.",
                cure="use soma.transaction(), or pass soma.store; soma_common.sync.TransactionScope is for psycopg "
                "and Django.",
            )
        check_mode(mode)
        self._store, self._mode, self._given_trace = store, mode, trace
        self._block: AbstractAsyncContextManager[Tx] | None = None

    async def __aenter__(self) -> Tx:
        if self._block is not None:
            raise TransactionError("This scope is open already.", cure="make a TransactionScope for each block.")
        self._block = self._begin()
        try:
            return await self._block.__aenter__()
        except BaseException:
            self._block = None
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None:
            await block.__aexit__(kind, error, trace)

    def _begin(self) -> AbstractAsyncContextManager[Tx]:
        outer = None if self._mode == "new" else innermost(self._store.pool, self._store)
        if outer is None:
            block, spans = _alone(self._store, self._trace), self._store.settings.spans
            # One with a trace of its own is a traced function's, which has a span and a name.
            return block if spans is None or self._given_trace is not None else _shown(spans, block)
        return _savepoint(outer) if self._mode == "savepoint" else _joined(outer)

    def _trace(self) -> TraceContext | None:
        return self._store.settings.current_trace() or self._given_trace


@asynccontextmanager
async def _shown(spans: Spans, block: AbstractAsyncContextManager[Tx]) -> AsyncIterator[Tx]:
    with spans.transaction():
        async with block as tx:
            yield tx


@asynccontextmanager
async def _alone(store: EventStore, trace: Callable[[], TraceContext | None]) -> AsyncIterator[Tx]:
    """A transaction of its own. A COMMIT whose answer is lost is settled, where its events tell."""
    published, committing = Published(), False
    try:
        async with store.pool.transaction() as connection:
            scope = Scope(store.pool, store, connection, trace)
            with scope.open() as tx:
                yield tx
            published = await _record(store, connection, scope.events)
            committing = True
    except DatabaseUnavailable as lost:
        if not committing:
            raise
        await _settle(store, published, lost)


@asynccontextmanager
async def _joined(outer: Scope) -> AsyncIterator[Tx]:
    with outer.part(unit=False).open() as tx:
        yield tx


@asynccontextmanager
async def _savepoint(outer: Scope) -> AsyncIterator[Tx]:
    async with in_transaction(outer.conn):
        with outer.part(unit=True).open() as tx:
            yield tx
            await _check_whole(outer.conn)


async def _record(store: EventStore, connection: Any, events: list[Event]) -> Published:
    """Record what was published; without events, see that there is something to commit."""
    if not connection.is_in_transaction():
        raise TransactionDoomed(
            "The block ended its transaction by itself.", cure="leave COMMIT and ROLLBACK to the scope."
        )
    if not events:
        await _check_whole(connection)
        return Published()
    with noticing_failures():
        return await store.publish(events, tx=connection)


async def _check_whole(connection: Any) -> None:
    """That no statement failed: PostgreSQL would answer COMMIT by a ROLLBACK, and asyncpg says nothing about it."""
    with noticing_failures():
        await fetch(connection, blocks("store")["whole"], ())


async def _settle(store: EventStore, published: Published, lost: DatabaseUnavailable) -> None:
    """Return if the transaction committed after all.

    Raises:
        DatabaseUnavailable: it did not.
        CommitUnknown: nobody can tell; it wrote no events, by which it could be found.
    """
    if published.transaction_id is None:
        raise CommitUnknown(
            f"The connection was lost at COMMIT of a transaction that recorded no new event ({lost.message}).",
            cure="look whether what it wrote is there; or publish an event in it, then the scope finds out.",
        ) from lost
    if not await store.outcome(published):
        raise lost
