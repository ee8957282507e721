"""An open transaction, with the events that shall be recorded in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from soma_common.errors import ValidationError
from soma_common.events.models import Event


class Guard(Protocol):
    """Who watches over the use of a ``Tx``."""

    def check(self) -> None:
        """Raise unless whoever calls may use the transaction now."""

    def accept(self, events: Sequence[Event]) -> Iterable[Event]:
        """The events as they are to wait for the commit; without those that were recorded at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Tx:
    """A transaction that somebody else commits.

    ``conn`` is the driver's connection in it: asyncpg's in ``async def``, psycopg's or Django's in plain functions.
    Write through it; do not commit or roll it back. Savepoints are fine.

    Raises:
        TransactionEnded, TransactionElsewhere: where a :class:`TransactionScope` opened it, for any use after its
            block, or from another task or thread than the block's.
    """

    _conn: Any
    _events: list[Event] = field(default_factory=list, repr=False)
    _guard: Guard | None = field(default=None, repr=False)

    @property
    def conn(self) -> Any:
        """The driver's connection, inside of the transaction."""
        if self._guard is not None:
            self._guard.check()
        return self._conn

    def publish(self, *events: Event) -> None:
        """Record events in this transaction, in one statement just before it commits.

        Raises:
            ValidationError: one of them is no Event; none of them was taken.
        """
        for event in events:
            if not isinstance(event, Event):
                raise ValidationError(f"{event!r:.80} is no Event.", cure="publish Event(payload=..., ...).")
        if self._guard is None:
            self._events.extend(events)
        else:
            self._guard.check()
            self._events.extend(self._guard.accept(events))

    @property
    def pending(self) -> Sequence[Event]:
        """What was published in the transaction and is not recorded yet."""
        return tuple(self._events)


def connection_of(tx: Any) -> Any:
    """The driver's connection that a caller's ``tx`` stands for: it may be a :class:`Tx`, or the connection itself."""
    return tx.conn if isinstance(tx, Tx) else tx
