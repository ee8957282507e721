"""What a consumer does with events: handlers, and what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.errors import ConfigurationError
from soma_common.events.keys import MAX_PART_BYTES
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload, check_payload
from soma_common.events.types import check_event_type
from soma_common.postgres.pool import Tx
from soma_common.tracing.context import TraceContext
from soma_common.tracing.tracer import TransactionTracer

Handle = Callable[[Any, Any], Awaitable[object] | object]
Typed = Callable[[RecordedEvent], RecordedEvent]

EVERY_TYPE: Final = "*"
_TRACER: Final = TransactionTracer()
_TAKEN: Final = ("relay:", "saga:")  # letters of relays and of sagas go by names that begin so


@dataclass(frozen=True, slots=True)
class Delivery:
    """How events come to a handler.

    ``redriven``: from the dead letters. ``replaying``: by a replay, not live. ``external_effects``: whether the handler
    may act outside of the database; not when tables are rebuilt from events whose mails were sent long ago.
    """

    redriven: bool = False
    replaying: bool = False
    external_effects: bool = True


LIVE: Final = Delivery()
REDRIVEN: Final = Delivery(redriven=True)


class HandlerContext:
    """What a handler works with, valid only while it runs.

    ``tx`` is the connection in the batch's transaction: what is written through it commits together with the mark
    that the event was applied, or not at all. Do not commit or roll it back; savepoints (``tx.transaction()``) are
    fine. ``event`` is the event as it was recorded, with its payload as a dict; ``delivery`` tells how it comes.
    """

    __slots__ = ("_collected", "consumer", "delivery", "event", "tx")

    def __init__(
        self, consumer: str, event: RecordedEvent, tx: Tx, collected: list[Event], delivery: Delivery = LIVE
    ) -> None:
        self.consumer, self.event, self.tx, self.delivery = consumer, event, tx, delivery
        self._collected = collected

    def publish(self, *events: Event) -> None:
        """Record events in the batch's transaction, just before it commits.

        What they leave open is taken from the handled event: it is their cause, and they join its correlation and
        its trace.
        """
        trace = _trace_after(self.event, self.delivery)
        self._collected.extend(_inherit(event, self.event, trace) for event in events)


class BatchContext:
    """What a batch handler works with; as :class:`HandlerContext`, for several events."""

    __slots__ = ("_collected", "consumer", "delivery", "events", "tx")

    def __init__(
        self, consumer: str, events: Sequence[RecordedEvent], tx: Tx, collected: list[Event], delivery: Delivery = LIVE
    ) -> None:
        self.consumer, self.events, self.tx, self.delivery = consumer, events, tx, delivery
        self._collected = collected

    def publish(self, *events: Event, cause: RecordedEvent | None) -> None:
        """Record events in the batch's transaction, just before it commits.

        Args:
            cause: the handled event from which they take what they leave open, or None.
        """
        if cause is None:
            self._collected.extend(events)
            return
        trace = _trace_after(cause, self.delivery)
        self._collected.extend(_inherit(event, cause, trace) for event in events)


class SyncHandlerContext(HandlerContext):
    """What a handler that is a plain function works with.

    It runs in a thread. ``tx`` is that thread's psycopg connection in the batch's transaction; or Django's, where the
    application was made with ``django=``: models then take part by themselves.
    """

    __slots__ = ()
    tx: Any


class SyncBatchContext(BatchContext):
    """The same for a batch handler."""

    __slots__ = ()
    tx: Any


def _trace_after(cause: RecordedEvent, delivery: Delivery) -> TraceContext:
    """The trace of what a handler publishes: its span's, if that goes on with the cause's trace or replaces it."""
    now = _TRACER.recorded()
    if now is None or (delivery is LIVE and now.trace_id != cause.trace.trace_id):
        return cause.trace
    return now


def _inherit(event: Event, cause: RecordedEvent, trace: TraceContext) -> Event:
    open_correlation = event.correlation_id == str(event.event_id)
    return replace(
        event,
        causation_id=event.causation_id or str(cause.event_id),
        correlation_id=cause.correlation_id if open_correlation else event.correlation_id,
        trace=event.trace or trace,
    )


@dataclass(frozen=True, slots=True)
class Handler:
    """A function for one event type. With a ``model`` the event's payload arrives as that model.

    ``batch``: it takes a list of events. ``blocking``: it is a plain function, which runs in a thread.
    """

    handle: Handle
    event_type: str
    model: type[Payload] | None = None
    batch: bool = False
    blocking: bool = False

    def prepared(self, event: RecordedEvent, typed: Typed | None) -> RecordedEvent:
        """The event in the form this handler takes.

        Raises:
            PayloadInvalid: the payload does not match the model.
        """
        if self.model is None:
            return event
        known = typed(event) if typed is not None else event
        if type(known.payload) is self.model:
            return known
        return known.with_payload(check_payload(known.payload, self.model), self.model.schema_version)


class Handlers:
    """The handlers of one consumer by event type.

    Args:
        typed: gives an event its typed payload, upcasting older versions; handlers with a model use it.
    """

    def __init__(self, typed: Typed | None = None) -> None:
        self.typed = typed
        self.blocking = self.batches = False
        self._by_type: dict[str, tuple[Handler, ...]] = {}
        self._every: tuple[Handler, ...] = ()

    def add(self, handle: Handle, *types: str | type[Payload], batch: bool = False) -> None:
        """Call ``handle`` for events of these types: names, payload models, or ``EVERY_TYPE``.

        Several handlers of one type run in the order in which they were added, in the same transaction. The handlers
        of one consumer are all ``async def`` or all plain functions: they share a transaction, and so its driver.

        Args:
            batch: it takes a list of events, as many as follow each other and have the same handlers.

        Raises:
            ConfigurationError: no type, not a function of two arguments, a generator, the same one twice for a type, or
                blocking beside async.
            ValidationError: not an event type.
        """
        name = getattr(handle, "__qualname__", repr(handle))
        if not callable(handle) or isinstance(handle, type):
            raise ConfigurationError(f"Handler {name:.200} is no function.", cure="pass a function of (event, ctx).")
        if _is(inspect.isgeneratorfunction, handle) or _is(inspect.isasyncgenfunction, handle):
            raise ConfigurationError(f"Handler {name} is a generator, and nobody would run it.", cure="remove `yield`.")
        if not types:
            raise ConfigurationError(f"Handler {name} names no event type.", cure="name types, models, or EVERY_TYPE.")
        check_types(types)
        _check_arguments(handle, name, batch)
        blocking = not _is_async(handle)
        if len(self) and blocking != self.blocking:
            raise ConfigurationError(
                f"Handler {name} is {'not ' if blocking else ''}async, and others of its consumer are"
                f"{'' if blocking else ' not'}: they cannot share a transaction.",
                cure="give it a consumer of its own.",
            )
        self.blocking = blocking
        for handler in [_handler(handle, wanted, batch, blocking) for wanted in types]:
            self._add(handler, name)
        self.batches = self.batches or batch

    def _add(self, handler: Handler, name: str) -> None:
        known = self._every if handler.event_type == EVERY_TYPE else self._by_type.get(handler.event_type, ())
        if any(other.handle is handler.handle for other in known):
            raise ConfigurationError(f"Handler {name} is added twice for {handler.event_type}.", cure="add it once.")
        if handler.event_type == EVERY_TYPE:
            self._every = (*known, handler)
        else:
            self._by_type[handler.event_type] = (*known, handler)

    def __len__(self) -> int:
        return len(self._every) + sum(map(len, self._by_type.values()))

    @property
    def types(self) -> frozenset[str]:
        """The event types that have a handler of their own."""
        return frozenset(self._by_type)

    def of(self, event_type: str) -> tuple[Handler, ...]:
        """The handlers of a type, in order; empty when there is none."""
        return self._by_type.get(event_type, ()) + self._every


def _handler(handle: Handle, wanted: str | type[Payload], batch: bool, blocking: bool) -> Handler:
    if isinstance(wanted, str):
        return Handler(handle, wanted, None, batch, blocking)
    return Handler(handle, wanted.event_type, wanted, batch, blocking)


def check_consumer(name: str) -> None:
    """That a consumer may be called so.

    Raises:
        ConfigurationError: it is empty, too long, no text, or the name of a relay's letters.
    """
    if not isinstance(name, str) or not name or "\0" in name or len(name.encode(errors="replace")) > MAX_PART_BYTES:
        raise ConfigurationError(
            f"A consumer cannot be called {name!r:.80}.", cure=f"use a text of 1 to {MAX_PART_BYTES} bytes."
        )
    if name.startswith(_TAKEN):
        raise ConfigurationError(
            f"A consumer cannot be called {name!r:.200}: the dead letters of relays and sagas are.",
            cure=f"choose a name that begins with none of {', '.join(_TAKEN)}.",
        )


def check_types(types: Sequence[object]) -> None:
    """That these are what a handler may name: event types, payload models, ``EVERY_TYPE``.

    Raises:
        ConfigurationError: something else; also a function, when a decorator was written without its parentheses.
        ValidationError: a text that is no event type.
    """
    for wanted in types:
        if isinstance(wanted, str):
            if wanted != EVERY_TYPE:
                check_event_type(wanted)
        elif not isinstance(wanted, type) or not issubclass(wanted, Payload):
            raise ConfigurationError(
                f"{getattr(wanted, '__qualname__', repr(wanted)):.200} is no event type and no payload model.",
                cure='name types, models, or EVERY_TYPE in parentheses: @soma.handler("order.placed").',
            )
        elif not hasattr(wanted, "event_type"):
            raise ConfigurationError(
                f"{wanted.__name__} has no event type.",
                cure=f"declare it: class {wanted.__name__}(Payload, event_type=…).",
            )


def _check_arguments(handle: Handle, name: str, batch: bool) -> None:
    """That it can be called as it will be: with another signature every event would fail, one after the other."""
    try:
        signature = inspect.signature(handle)
    except (TypeError, ValueError):  # a callable that does not tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigurationError(
            f"Handler {name} cannot be called with {'events' if batch else 'an event'} and a context: {error}.",
            cure=f"declare it as handle({'events' if batch else 'event'}, ctx).",
        ) from error


def require_done(said: object) -> None:
    """What a handler returns is ignored, unless it is work that nobody will do.

    Raises:
        ConfigurationError: a coroutine, a generator or something else to await.
    """
    if inspect.iscoroutine(said) or inspect.isgenerator(said):
        said.close()
        kind = "a coroutine, which nobody awaits" if inspect.iscoroutine(said) else "a generator, which nobody runs"
    elif inspect.isawaitable(said) or inspect.isasyncgen(said):
        kind = f"{type(said).__name__}, which nobody awaits"
    else:
        return
    raise ConfigurationError(
        f"A handler returned {kind}: its effects never happened.",
        cure="declare it `async def` and await what it calls; a decorator around it must be `async def` too.",
    )


def _is_async(handle: Any) -> bool:
    return _is(inspect.iscoroutinefunction, handle)


def _is(kind: Callable[[Any], bool], handle: Any) -> bool:
    call = handle if inspect.isroutine(handle) else getattr(handle, "__call__", handle)  # noqa: B004 - an instance
    return kind(handle) or kind(call)
