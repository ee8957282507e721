"""Scopes of transactions without I/O: who may use them, which one takes part in which, what becomes of their events."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Final, Literal, Self, get_args

from soma_common.errors import ConfigurationError, TransactionDoomed, TransactionElsewhere, TransactionEnded
from soma_common.events.models import Event
from soma_common.postgres.errors import sqlstate_of
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx

Mode = Literal["join", "savepoint", "new"]
CurrentTrace = Callable[[], TraceContext | None]

_ABORTED: Final = "25P02"  # in_failed_sql_transaction
_ENDS_ALONE: Final = "let the error pass, or open the scope that may fail with mode='savepoint'."


def check_mode(mode: str) -> None:
    """Raise ConfigurationError for what is no mode."""
    if mode not in get_args(Mode):
        raise ConfigurationError(f"{mode!r:.80} is no mode of a transaction.", cure="use join, savepoint or new.")


def here() -> object:
    """The task that runs now; outside of tasks the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    return task or threading.current_thread()


class Scope:
    """An open scope: it guards its ``tx``, and keeps the events that are published in it.

    The scopes of one database transaction share the list of its events. ``within`` is the scope whose transaction it
    takes part in. What can be rolled back alone is a *unit*: a whole transaction, or a savepoint; such a scope drops
    what was published since it began, as the database drops what was written.

    Args:
        place: what tells transactions apart: scopes of one place take part in each other.
        store: where its events will be recorded.
        conn: what the user gets as ``tx.conn``.
        trace: the trace that events without one of their own join.
    """

    def __init__(
        self, place: object, store: Any, conn: Any, trace: CurrentTrace, *,
        within: Scope | None = None, unit: bool = True,
    ) -> None:  # fmt: skip
        self.place, self.store, self.conn, self.unit = place, store, conn, unit
        self.within: Any = within  # of the same class
        self._owner, self._before = here(), _open_before()
        self._trace, self._open_inside, self._ended = trace, 0, False
        self._doom: BaseException | None = None
        self.events: list[Event] = within.events if within is not None else []
        self._mark = len(self.events)
        self.tx = Tx(conn, self.events, self)

    @property
    def is_mine(self) -> bool:
        """Whether it is open, and opened by whoever asks."""
        return not self._ended and self._owner is here()

    def part(self, *, unit: bool) -> Self:
        """A scope that takes part in this one's transaction."""
        return type(self)(self.place, self.store, self.conn, self._trace, within=self, unit=unit)

    def check(self) -> None:
        """Raise unless whoever calls may use the transaction now.

        Raises:
            TransactionEnded, TransactionElsewhere: it may not.
        """
        if self._ended:
            raise TransactionEnded(cure="use `tx` inside of the block that opened it, or open another one.")
        if self._owner is not here():
            raise TransactionElsewhere(
                f"A transaction was opened by {_name(self._owner)} and is used by {_name(here())}: its "
                "statements would run between each other's.",
                cure="await the work instead of starting a task or a thread for it (asyncio.timeout in place of "
                "asyncio.wait_for), or let that open a transaction of its own.",
            )

    def accept(self, events: Sequence[Event]) -> Iterable[Event]:
        """The events, in the trace that is current now: later it may be another one."""
        trace = self._trace()
        if trace is None:
            return events
        return [event if event.trace is not None else replace(event, trace=trace) for event in events]

    @contextmanager
    def open(self) -> Iterator[Tx]:
        """The block of the scope: an error in it dooms what it takes part in.

        Raises:
            TransactionDoomed: a part of it failed, and the error was swallowed; or a part of it is still open.
        """
        _INNERMOST.set(self)
        if self.within is not None:
            self.within._open_inside += 1
        try:
            yield self.tx
            self._check_whole()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._leave()

    def _fail(self, error: BaseException) -> None:
        if self.unit:
            del self.events[self._mark :]
        elif self.within is not None:
            self.within._doomed_by(error)

    def _doomed_by(self, error: BaseException) -> None:
        if not self.unit and self.within is not None:
            self.within._doomed_by(error)
        self._doom = self._doom or error

    def _check_whole(self) -> None:
        if self._open_inside:
            raise TransactionDoomed(
                "A transaction ends while a scope inside of it is still open.", cure="nest scopes by `with` blocks."
            )
        if self._doom is not None and self.unit:
            raise TransactionDoomed(
                f"A scope that took part in this transaction failed ({_told(self._doom)}), and the error was "
                "swallowed: a half of its work would be committed.",
                cure=_ENDS_ALONE,
            ) from self._doom

    def _leave(self) -> None:
        self._ended, self._doom = True, None
        if self.within is not None:
            self.within._open_inside -= 1
        if _INNERMOST.get() is self:
            _INNERMOST.set(self._before)


_INNERMOST: ContextVar[Scope | None] = ContextVar("soma_scope", default=None)


def innermost(place: object, store: object) -> Scope | None:
    """The innermost open scope of a place that this task or thread opened. Tasks inherit it from those that start them,
    but it is not theirs.

    Raises:
        ConfigurationError: its events are recorded by another store.
    """
    scope = _INNERMOST.get()
    while scope is not None and not (scope.is_mine and scope.place is place):
        scope = scope._before
    if scope is not None and scope.store is not store:
        raise ConfigurationError(
            "Two event stores would record events in one transaction.",
            cure="use one store for both scopes, or mode='new' for the inner one.",
        )
    return scope


def innermost_of(store: object) -> Scope | None:
    """The innermost open scope, of any place, that this task or thread opened and whose events this store records."""
    scope = _INNERMOST.get()
    while scope is not None and not (scope.is_mine and scope.store is store):
        scope = scope._before
    return scope


def _open_before() -> Scope | None:
    """The innermost scope, whoever opened it; those that ended elsewhere are forgotten."""
    scope = _INNERMOST.get()
    while scope is not None and scope._ended:
        scope = scope._before
    return scope


@contextmanager
def noticing_failures() -> Iterator[None]:
    """Around a last statement: where PostgreSQL has given the transaction up before, somebody swallowed the reason.

    Raises:
        TransactionDoomed: it has.
    """
    try:
        yield
    except Exception as error:
        if sqlstate_of(error) != _ABORTED:
            raise
        raise failed_before() from error


def failed_before() -> TransactionDoomed:
    """The error for a transaction of which PostgreSQL would commit nothing."""
    return TransactionDoomed(
        "A statement failed in this transaction, and the error was swallowed: PostgreSQL commits nothing of it.",
        cure="let the error pass, or run what may fail in a scope with mode='savepoint'.",
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error!s:.200}"


def _name(owner: object) -> str:
    if isinstance(owner, asyncio.Task):
        return f"task {owner.get_name()}"
    return f"thread {owner.name}" if isinstance(owner, threading.Thread) else "another one"
