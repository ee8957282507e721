"""The event store and transactions for synchronous code: psycopg 3 and Django.

store = soma.sync_store()

with TransactionScope(store, connection) as tx:    # django.db.connection
    order.save()
    tx.publish(Event(...))                         # commits with the order, or not at all
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any

from soma_common.errors import CommitUnknown, ConfigurationError, TransactionError
from soma_common.events.append import (
    AppendSettings,
    Expected,
    Published,
    Stamps,
    Statement,
    Steps,
    answer,
    append_steps,
)
from soma_common.events.models import ANY, Event
from soma_common.events.tally import AppendTally
from soma_common.postgres.blocks import block, check_whole, depth, is_idle, mark, marks
from soma_common.postgres.errors import is_connection_loss, translated, translated_around_callers
from soma_common.postgres.sync import driver_connection, fetch_sync, is_django, transaction_if_none
from soma_common.scopes import Mode, Scope, check_mode, innermost
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx, connection_of


class EventStore:
    """Records events in the transaction of the caller's connection; never commits it."""

    def __init__(self, settings: AppendSettings) -> None:
        self.settings = settings
        self._stamps = Stamps()
        self.tally = AppendTally()

    def publish(
        self, events: Event | Iterable[Event], connection: Any, *, expected_version: Expected = ANY, again: bool = False
    ) -> Published:
        """Record events; all of them or none. The rules and errors are those of ``soma_common.EventStore.publish``.

        ``connection`` is psycopg's or Django's, or the ``Tx`` of a scope. On one in autocommit the append is a
        transaction of its own. ``again`` settles an earlier publish whose outcome is unknown: what was recorded then
        is returned.
        """
        batch = [events] if isinstance(events, Event) else list(events)
        if not batch:
            return Published()
        with self.tally.timed(len(batch)):
            return self._publish(batch, connection_of(connection), expected_version, again)

    def _publish(self, batch: Sequence[Event], connection: Any, expected_version: Expected, again: bool) -> Published:
        steps = append_steps(batch, self.settings, self._stamps, expected=expected_version, again=again)
        following = answer(steps, fetch_sync(connection, *next(steps)))
        if isinstance(following, Published):
            return following
        # Refused for its stamp, or a duplicate: with the locks kept, the next try meets no third party.
        with translated(), transaction_if_none(connection):
            return _run(steps, following, connection)


def _run(steps: Steps, following: Statement | Published, connection: Any) -> Published:
    """Carry out what follows on a connection, to the end."""
    while not isinstance(following, Published):
        following = answer(steps, fetch_sync(connection, *following))
    return following


class TransactionScope:
    """A block in a transaction of psycopg's or Django's connection: the synchronous twin of
    :class:`soma_common.transactions.TransactionScope`, with its modes and errors.

    On a connection without a transaction the block is one: it commits at the end, and rolls back on an error. In a
    transaction that the caller opened (Django's ``atomic``, say) it takes part, and whoever opened that commits it;
    events are recorded at the end of the block. Django's ``atomic`` may be used inside as well: events that were
    published in one that is rolled back are dropped.

    Args:
        connection: a psycopg connection, or ``django.db.connection``.
        mode: what it is in a transaction that is open: ``join`` takes part, ``savepoint`` is undone alone when it
            fails, ``new`` refuses (a connection has one transaction).
        trace: what events that have no trace join where no span is current.

    Raises:
        TransactionDoomed: an error inside was swallowed; what the block opened is rolled back.
        TransactionConflict: run the whole transaction again.
        TransactionError: ``new`` in an open transaction.
        CommitUnknown: the connection was lost at COMMIT.
    """

    def __init__(
        self, store: EventStore, connection: Any, *, mode: Mode = "join", trace: TraceContext | None = None
    ) -> None:
        if not isinstance(store, EventStore):
            raise ConfigurationError(
                f"A {type(store).__name__} is no synchronous event store.", cure="pass soma.sync_store()."
            )
        check_mode(mode)
        self._store, self._connection, self._mode, self._given_trace = store, connection, mode, trace
        self._block: AbstractContextManager[Tx] | None = None

    def __enter__(self) -> Tx:
        if self._block is not None:
            raise TransactionError("This scope is open already.", cure="make a TransactionScope for each block.")
        self._block = self._begin()
        try:
            return self._block.__enter__()
        except BaseException:
            self._block = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(kind, error, trace)

    def _begin(self) -> AbstractContextManager[Tx]:
        with translated():
            place, idle = driver_connection(self._connection), is_idle(self._connection)
        if self._mode == "new" and not idle:
            raise TransactionError(
                "A transaction is open on this connection, and it has one at a time.",
                cure="pass another connection, or use mode='savepoint'.",
            )
        outer = innermost(place, self._store)
        if not isinstance(outer, _SyncScope):
            return self._alone(place, idle)
        # In a block of the driver's own that may be undone alone, it has to be something that can be, too.
        alone = self._mode == "savepoint" or outer.is_left
        return self._savepoint(outer) if alone else outer.part(unit=False).open()

    @contextmanager
    def _alone(self, place: object, idle: bool) -> Iterator[Tx]:
        """A unit that records its events itself; where no transaction was open it commits, too."""
        connection, committing = self._connection, False
        with self._span(), translated_around_callers():
            try:
                with block(connection, savepoint=self._mode == "savepoint"):
                    scope = _SyncScope(place, self._store, connection, self._trace)
                    with scope.open() as tx:
                        yield tx
                        check_whole(connection)
                    self._store.publish(scope.kept(), connection)
                    committing = idle
            except Exception as error:
                if committing and is_connection_loss(error):
                    raise _unknown() from error
                raise

    def _span(self) -> AbstractContextManager[Any]:
        """One with a trace of its own is a traced function's, which has a span and a name."""
        spans = self._store.settings.spans
        return nullcontext() if spans is None or self._given_trace is not None else spans.transaction()

    @contextmanager
    def _savepoint(self, outer: Scope) -> Iterator[Tx]:
        with block(self._connection, savepoint=True), outer.part(unit=True).open() as tx:
            yield tx
            check_whole(self._connection)

    def _trace(self) -> TraceContext | None:
        return self._store.settings.current_trace() or self._given_trace


class _SyncScope(Scope):
    """A scope that sees the blocks which its user opens by the driver's means."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._depth = depth(self.conn)
        self._first_depth: int = self.within._first_depth if self.within is not None else self._depth
        # Django's marks of the events that were published in blocks of its own; one list for the whole transaction.
        self._marked: list[tuple[object, list[Event]]] = self.within._marked if self.within is not None else []

    @property
    def is_left(self) -> bool:
        """Whether its user is in a deeper block, which may be undone alone."""
        return depth(self.conn) != self._depth

    def accept(self, events: Sequence[Event]) -> Iterable[Event]:
        """The events; where Django may undo them, it is noted in which block they were published."""
        traced = super().accept(events)
        if not is_django(self.conn) or depth(self.conn) == self._first_depth:
            return traced
        copies = [replace(event) for event in traced]  # the same object may also be published elsewhere
        self._marked.append((mark(self.conn), copies))
        return copies

    def kept(self) -> list[Event]:
        """What is to be recorded: all but the events whose block was undone."""
        if not self._marked:
            return self.events
        there = marks(self.conn)
        gone = {id(event) for marked, events in self._marked if marked not in there for event in events}
        return [event for event in self.events if id(event) not in gone]


def _unknown() -> CommitUnknown:
    return CommitUnknown(
        "The connection was lost at COMMIT: it is unknown whether the transaction committed.",
        cure="on a new connection look for what it wrote, or for its events by their event_id.",
    )
