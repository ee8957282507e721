"""A writer process on psycopg, synchronous: its lost COMMITs are settled by publishing again."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

from soma_common.errors import AppendError, DatabaseUnavailable
from soma_common.events.append import Published
from soma_common.events.models import Event
from soma_common.postgres.errors import translated
from soma_common.sync import EventStore
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.torture.children import die_with_parent
from tests.torture.settings import append_settings, dsn
from tests.torture.units import FACT, Unit, Work

KINDS = ("short", "short", "many", "rollback", "savepoint", "keyed", "cut", "alone")


class _RolledBack(Exception):
    """Ends a savepoint or a transaction."""


class Writer:
    """Does units of work until it is asked to stop."""

    def __init__(self, work: Work, address: str) -> None:
        self.work, self.address = work, address
        self.proxy = proxy_to(address)
        self.store = EventStore(append_settings(work.settings))
        self.stopping = False
        self._connections: dict[str, psycopg.Connection[Any]] = {}

    def run(self) -> None:
        """The loop."""
        while not self.stopping:
            time.sleep(self.work.pause())
            kind = self.work.chance.choice(KINDS)
            unit = self.work.fill(self.work.unit(), kind)
            self.work.begins(unit)
            self.work.ends(unit, self.one(unit, kind))
        self.proxy.close()

    def one(self, unit: Unit, kind: str) -> Sequence[Event]:
        """The events of the unit that are in the log now; tries again until the database says."""
        again = False
        while True:
            committing = False
            try:
                with translated():
                    connection = self.connection("near" if again or kind != "cut" else "far")
                    if kind == "alone":
                        committing = True
                        return self.own(unit, self.store.publish(unit.events, connection, again=again))
                    with suppress(_RolledBack), connection.transaction():
                        done = self.publish(connection, unit, kind, again)
                        if kind == "rollback":
                            raise _RolledBack
                        committing = True
                        if kind == "cut":
                            self.proxy.cut_at_commit(self.work.chance.choice([CommitCut.BEFORE, CommitCut.AFTER]))
                    if connection.closed and kind != "rollback":  # lost within a savepoint: psycopg says nothing then
                        raise DatabaseUnavailable("The connection was lost before COMMIT.")
                    return [] if kind == "rollback" else self.own(unit, done)
            except AppendError:
                return []
            except DatabaseUnavailable:
                self.forget()
                if not committing and not again:
                    return []
                again = True
                time.sleep(0.1)

    def publish(self, connection: Any, unit: Unit, kind: str, again: bool) -> Published:
        """The inside of the transaction."""
        events = unit.dropped if kind == "rollback" else unit.events
        done = self.record(connection, unit, events, again)
        if kind == "savepoint":
            with suppress(_RolledBack), connection.transaction():
                self.record(connection, unit, unit.dropped, False)
                raise _RolledBack
        return done

    def record(self, connection: Any, unit: Unit, events: Sequence[Event], again: bool) -> Published:
        """Publish, and a fact beside each event that is written now."""
        done = self.store.publish(events, connection, again=again)
        mine = {event.event_id for event in events}
        written = [event.event_id for event in done if event.event_id in mine] if done.transaction_id else []
        with psycopg.RawCursor(connection) as cursor:
            cursor.execute(FACT, (written, unit.name))
        return done

    def connection(self, which: str) -> psycopg.Connection[Any]:
        """An open connection in autocommit, directly or through the proxy."""
        known = self._connections.get(which)
        if known is None or known.closed:
            address = self.proxy.through(self.address) if which == "far" else self.address
            known = psycopg.connect(address, autocommit=True, connect_timeout=10)
            self._connections[which] = known
        return known

    def forget(self) -> None:
        """Close what may be broken."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    @staticmethod
    def own(unit: Unit, done: Published) -> Sequence[Event]:
        """What this unit recorded, without the originals of repeated idempotency keys."""
        recorded = {event.event_id for event in done}
        return [event for event in unit.events if event.event_id in recorded]


def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    writer = Writer(Work(folder, name, life), dsn(folder))

    def stop(*_: object) -> None:
        # Not threading.Event: the handler may run while its lock is held by this very thread.
        writer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    writer.run()


if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
