"""What the tests of transaction scopes share: a store, a table of the user's own, and a look at both."""

from __future__ import annotations

from typing import Any

from soma_common.events.store import EventStore
from soma_common.transactions import TransactionScope
from soma_common.tx import Tx
from tests.core_support import event


class Undone(Exception):
    """Raised to roll back."""


class World:
    """A store, a table of the user's own, and what is in both."""

    def __init__(self, store: EventStore, dsn: str) -> None:
        self.store, self.dsn = store, dsn

    def scope(self, mode: Any = "join") -> TransactionScope:
        return TransactionScope(self.store, mode=mode)

    async def write(self, tx: Tx, name: str) -> None:
        """A row and an event of this name."""
        await tx.conn.execute("INSERT INTO rows VALUES ($1)", name)
        tx.publish(event(name))

    async def there(self) -> list[str]:
        """The names that are there, as rows and as events: always the same ones."""
        rows = [row[0] for row in await self.store.pool.fetch("SELECT name FROM rows ORDER BY ctid")]
        events = [
            row[0] for row in await self.store.pool.fetch("SELECT aggregate_id FROM soma.events ORDER BY position")
        ]
        assert sorted(rows) == sorted(events)
        return events
