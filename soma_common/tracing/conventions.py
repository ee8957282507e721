"""How spans are called and what they say: OpenTelemetry's conventions for messaging and HTTP, in this one place.

Followed are the semantic conventions 1.36 and later: https://opentelemetry.io/docs/specs/semconv/messaging/. A span of
an operation is called ``{operation} {destination}``. What has no convention is called ``soma.*``. The table of all of
this is docs/reference/tracing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

Kind = Literal["internal", "producer", "consumer", "client", "server"]
Attributes = Mapping[str, Any]

ERROR_TYPE: Final = "error.type"

SYSTEM: Final = "messaging.system"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
DESTINATION: Final = "messaging.destination.name"
PARTITION: Final = "messaging.destination.partition.id"
GROUP: Final = "messaging.consumer.group.name"
COUNT: Final = "messaging.batch.message_count"
MESSAGE_ID: Final = "messaging.message.id"
CONVERSATION: Final = "messaging.message.conversation_id"
KAFKA_OFFSET: Final = "messaging.kafka.offset"

EVENT_TYPE: Final = "soma.event.type"
TENANT: Final = "soma.tenant.id"
DELIVERY: Final = "soma.delivery"
SAGA: Final = "soma.saga.name"
SAGA_ID: Final = "soma.saga.id"
STEP: Final = "soma.saga.step"
ATTEMPT: Final = "soma.saga.attempt"
UNDOING: Final = "soma.saga.undoing"
REPLAY_ID: Final = "soma.replay.id"
REPLAY_MODE: Final = "soma.replay.mode"

METHOD: Final = "http.request.method"
STATUS: Final = "http.response.status_code"
ROUTE: Final = "http.route"
PATH: Final = "url.path"
SCHEME: Final = "url.scheme"

LOG: Final = "soma.events"
"""The destination of events where no topic is: the table of the log, which consumers read."""

_TYPES: Final = {"append": "create", "send": "send", "process": "process", "settle": "settle"}
_KINDS: Final[Mapping[str, Kind]] = {
    "append": "producer",  # what it makes is the context that travels with the message ...
    "send": "client",  # ... so this is none, but a call of the broker
    "process": "consumer",
    "settle": "client",
}
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})


class Doing(NamedTuple):
    """A span that is to be: ``more`` is asked for attributes only when somebody records it."""

    name: str
    kind: Kind
    attributes: Attributes
    more: Callable[[], Attributes] | None = None


@lru_cache(maxsize=4096)
def _operation(name: str, destination: str | None, system: str | None = None) -> tuple[str, Kind, Attributes]:
    """What all spans of an operation at a destination have in common, made once: topics are few."""
    given = {
        SYSTEM: system or ("soma" if destination == LOG else "kafka"),
        OPERATION_NAME: name,
        OPERATION_TYPE: _TYPES[name],
    }
    if destination is None:  # several, or not known
        return name, _KINDS[name], given
    return f"{name} {destination}", _KINDS[name], given | {DESTINATION: destination}


def appending(topics: Sequence[str | None], events: Sequence[Any]) -> Doing:
    """Events are recorded in one statement; the trace that travels with them begins here."""
    known = {topic or LOG for topic in topics}

    def more() -> Attributes:
        return _of_events(events)

    return Doing(*_operation("append", known.pop() if len(known) == 1 else None), more)


def sending(topic: str, partition: int, count: int) -> Doing:
    """A batch of records goes to one partition."""
    return Doing(*_operation("send", topic), lambda: {PARTITION: str(partition), COUNT: count})


def processing(consumer: str, events: Sequence[Any], place: Any, delivery: str) -> Doing:
    """A consumer's handlers of one event; or of a batch, where a handler takes several.

    ``place`` is the record's (partition, offset); None where it is not known, as of a dead letter.
    """

    def more() -> Attributes:
        known: dict[str, Any] = {GROUP: consumer, DELIVERY: delivery} | _of_events(events)
        if place is not None:
            known[PARTITION] = str(place[0].number)
            if place[0].name != LOG and len(events) == 1:
                known[KAFKA_OFFSET] = place[1]
        return known

    known = _operation("process", None, "soma") if place is None else _operation("process", place[0].name)
    return Doing(*known, more)


def settling(consumer: str, destination: str | None, count: int) -> Doing:
    """The effects of a batch and the mark that its events are applied are committed."""
    return Doing(*_operation("settle", destination), lambda: {GROUP: consumer, COUNT: count})


def _of_events(events: Sequence[Any]) -> dict[str, Any]:
    """What is said of one message, or of several."""
    types = {event.event_type for event in events}
    said: dict[str, Any] = {EVENT_TYPE: types.pop()} if len(types) == 1 else {}
    if len(events) == 1:
        (event,) = events
        return said | {
            MESSAGE_ID: str(event.event_id), CONVERSATION: event.correlation_id, TENANT: event.tenant_id
        }  # fmt: skip
    return said | {COUNT: len(events)}


def stepping(context: Any) -> Doing:
    """An attempt at a step of a saga, or at its compensation."""
    undoing = "undo " if context.undoing else ""

    def more() -> Attributes:
        return {
            SAGA: context.saga, SAGA_ID: str(context.saga_id), STEP: context.step, ATTEMPT: context.attempt,
            UNDOING: context.undoing, TENANT: context.tenant_id, CONVERSATION: context.correlation_id,
        }  # fmt: skip

    return Doing(f"{context.saga} {undoing}{context.step}", "internal", {}, more)


def starting(saga: Any) -> Doing:
    """A saga is begun: what its steps are part of."""
    name = str(getattr(saga, "name", "saga"))  # what is no saga is refused inside of the span
    return Doing(f"start {name}", "internal", {SAGA: name})


def replaying(consumer: str, run: Any) -> Doing:
    """A batch of a replay."""

    def more() -> Attributes:
        return {GROUP: consumer, REPLAY_ID: str(run.run_id), REPLAY_MODE: str(run.mode)}

    return Doing(f"replay {consumer}", "internal", {}, more)


def transaction() -> Doing:
    """A transaction that was given no name."""
    return _TRANSACTION


_TRANSACTION: Final = Doing("transaction", "internal", {})


def requesting(method: str, path: str, scheme: str) -> Doing:
    """A request that nobody else has a span for; it gets its route at the end, when that is known."""
    known = method if method in _METHODS else "_OTHER"
    name = known if method in _METHODS else "HTTP"
    return Doing(name, "server", {METHOD: known, PATH: path, SCHEME: scheme})
