"""An open transaction, with the events that shall be recorded in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from soma_common.errors import ValidationError
from soma_common.events.models import Event


@dataclass(frozen=True, slots=True)
class Tx:
    """A transaction that somebody else commits.

    ``conn`` is the driver's connection in it: asyncpg's in ``async def``, psycopg's or Django's in plain functions.
    Write through it; do not commit or roll it back. Savepoints are fine.
    """

    conn: Any
    _events: list[Event] = field(default_factory=list, repr=False)

    def publish(self, *events: Event) -> None:
        """Record events in this transaction, in one statement just before it commits."""
        for event in events:
            if not isinstance(event, Event):
                raise ValidationError(f"{event!r:.80} is no Event.", cure="publish Event(payload=..., ...).")
        self._events.extend(events)

    @property
    def pending(self) -> Sequence[Event]:
        """What was published and is not recorded yet."""
        return tuple(self._events)
