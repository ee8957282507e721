"""The event store for synchronous code: psycopg 3 and Django.

store = soma.sync_store()

with transaction.atomic():
    order.save()
    store.publish(Event(...), connection)      # django.db.connection: commits with the order, or not at all
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
from soma_common.postgres.errors import translated
from soma_common.postgres.sync import fetch_sync, transaction_if_none


class EventStore:
    """Records events in the transaction of the caller's connection; never commits it."""

    def __init__(self, settings: AppendSettings) -> None:
        self.settings = settings
        self._stamps = Stamps()

    def publish(
        self, events: Event | Iterable[Event], connection: Any, *, expected_version: Expected = ANY, again: bool = False
    ) -> Published:
        """Record events; all of them or none. The rules and errors are those of ``soma_common.EventStore.publish``.

        On a connection in autocommit the append is a transaction of its own. ``again`` settles an earlier publish
        whose outcome is unknown: what was recorded then is returned.
        """
        batch = [events] if isinstance(events, Event) else list(events)
        if not batch:
            return Published()
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
