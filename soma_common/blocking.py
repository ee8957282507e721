"""Transactions of an application's plain functions, which bring no connection of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from soma_common.events.models import Event
from soma_common.postgres.lending import Lender
from soma_common.scopes import Mode, innermost_of
from soma_common.sync import EventStore, TransactionScope
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx


class BlockingTransactions:
    """Scopes on connections that are lent for them: inside of an open one of the same thread, on that one's.

    Args:
        make_store, make_lender: called when they are first needed; the lender again after ``close``.
    """

    def __init__(self, make_store: Callable[[], EventStore], make_lender: Callable[[], Lender]) -> None:
        self._make_store, self._make_lender = make_store, make_lender
        self._store: EventStore | None = None
        self._lender: Lender | None = None
        self._making = threading.Lock()

    @property
    def store(self) -> EventStore:
        """The store that records the events; the same one always."""
        with self._making:
            if self._store is None:
                self._store = self._make_store()
            return self._store

    @property
    def made_store(self) -> EventStore | None:
        """The store, if anybody needed it."""
        return self._store

    @contextmanager
    def scope(self, *, mode: Mode = "join", trace: TraceContext | None = None) -> Iterator[Tx]:
        """A ``soma_common.sync.TransactionScope``; ``new`` has a connection of its own, but with Django."""
        store = self.store
        outer = innermost_of(store) if mode != "new" else None
        if outer is not None:
            with TransactionScope(store, outer.conn, mode=mode, trace=trace) as tx:
                yield tx
            return
        with (
            self._ready_lender().lend() as connection,
            TransactionScope(store, connection, mode=mode, trace=trace) as tx,
        ):
            yield tx

    def record(self, event: Event) -> None:
        """Record an event in a transaction of its own, whatever transaction the caller's thread is in."""
        with self._ready_lender().lend_idle() as connection:
            self.store.publish(event, connection)

    def close(self) -> None:
        """Give connections back. Safe to call twice; used again, it begins anew."""
        with self._making:
            lender, self._lender = self._lender, None
        if lender is not None:
            lender.close()

    def _ready_lender(self) -> Lender:
        with self._making:
            if self._lender is None:
                self._lender = self._make_lender()
            return self._lender
