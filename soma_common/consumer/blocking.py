"""Handlers that are plain functions: they run in the thread that has the batch's connection."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from soma_common.ambient import AMBIENT
from soma_common.consumer.handlers import (
    Delivery,
    Handler,
    Handlers,
    SyncBatchContext,
    SyncHandlerContext,
    require_done,
)
from soma_common.consumer.lanes import Lane, Running
from soma_common.consumer.spans import HandlerSpans
from soma_common.events.models import Event, RecordedEvent
from soma_common.postgres.threads import ThreadTx

Handled = tuple[int, RecordedEvent, Sequence[Handler]]


class _Call(NamedTuple):
    """A handler and what it is called with; ``place`` is that of the event in the batch, None for several."""

    handler: Handler
    place: int | None
    events: Sequence[RecordedEvent]


class Run:
    """The handlers of a batch, one call after the other. A thread is slow to reach: it is given all of them at once.

    The lane's ``work`` tells which call runs. After each it is looked whether the transaction can still commit, so that
    nobody but the culprit is blamed. A transaction that is stopped gets no further call.
    """

    def __init__(
        self, consumer: str, handlers: Handlers, lane: Lane, tx: ThreadTx, collected: list[Event], delivery: Delivery,
        spans: HandlerSpans,
    ) -> None:  # fmt: skip
        self._consumer, self._handlers, self._lane, self._tx = consumer, handlers, lane, tx
        self._work = lane.work  # the lane gets another one when this thread is left behind
        self._collected, self._delivery, self._spans = collected, delivery, spans

    def __call__(self, handled: Sequence[Handled]) -> None:
        """In the thread. Raises what a handler raised, or why the transaction cannot commit any more."""
        for call in _calls(handled, batches=self._handlers.batches):
            if self._tx.stopped:
                return
            self._work.running = Running(time.monotonic(), call.place)
            AMBIENT.set(call.events[0] if len(call.events) == 1 else None)  # this thread runs in a copied context
            with self._spans.around(self._lane, call.events, call.place, self._delivery):
                self._one(call)
            self._tx.check()
        self._work.running = None

    def _one(self, call: _Call) -> None:
        handler, tx = call.handler, self._tx.driver
        prepared = [handler.prepared(event, self._handlers.typed) for event in call.events]
        if handler.batch:
            several = SyncBatchContext(self._consumer, call.events, tx, self._collected, self._delivery)
            said = handler.handle(prepared, several)
        else:
            one = SyncHandlerContext(self._consumer, call.events[0], tx, self._collected, self._delivery)
            said = handler.handle(prepared[0], one)
        if said is not None:
            require_done(said)


def _calls(handled: Sequence[Handled], *, batches: bool) -> Iterator[_Call]:
    """Event by event; or, where handlers take several, those that follow each other and have the same handlers."""
    if not batches:
        for place, event, handlers in handled:
            for handler in handlers:
                yield _Call(handler, place, (event,))
        return
    for handlers, group in groupby(handled, key=lambda entry: entry[2]):
        run = list(group)
        for handler in handlers:
            if handler.batch:
                yield _Call(handler, run[0][0] if len(run) == 1 else None, [event for _, event, _ in run])
            else:
                for place, event, _ in run:
                    yield _Call(handler, place, (event,))
