"""The append without I/O: prepares the arguments of ``soma.append`` and reads its answers.

A generator yields a statement and is sent its rows, so that asyncpg, psycopg (sync and async) and Django share it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from soma_common.clock import MICROSECOND, Clock, utc_now
from soma_common.errors import AppendError, ClockAhead, IdempotencyKeyReused, ValidationError, WrongExpectedVersion
from soma_common.events.codec import Codec, JsonCodec
from soma_common.events.keys import StreamKey, kafka_key
from soma_common.events.models import ANY, EXISTS, NO_STREAM, Event, RecordedEvent
from soma_common.events.payloads import (
    MAX_METADATA_BYTES,
    MAX_PAYLOAD_BYTES,
    PayloadModels,
    check_payload,
    to_json,
)
from soma_common.events.rows import SELECT, recorded_event
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext

Statement = tuple[str, Sequence[Any]]
Steps = Generator[Statement, Sequence[Sequence[Any]], "Published"]
Expected = int | Mapping[StreamKey, int]

MAX_BATCH = 10_000
_TRIES = 20
_EXPECTED_NAMES = {ANY: "any version", EXISTS: "any existing version", NO_STREAM: "no stream"}


class Published(tuple[RecordedEvent, ...]):
    """The recorded events, in the order in which they were given.

    ``transaction_id`` is the PostgreSQL transaction that wrote them (None when all of them were there already): if the
    caller's COMMIT is lost, ``EventStore.outcome(published)`` tells how it ended.
    """

    transaction_id: int | None = None


@dataclass(frozen=True, slots=True)
class AppendSettings:
    """What every append of a store shares.

    ``route`` gives the Kafka topic of an event, or None where no outbox row is wanted. ``current_trace`` gives the
    trace that events without one of their own join; where there is none, each publish begins a new one.
    """

    service_id: str
    models: PayloadModels = field(default_factory=PayloadModels)
    codec: Codec = field(default_factory=JsonCodec)
    route: Callable[[Event], str] | None = None
    clock: Clock = utc_now
    current_trace: Callable[[], TraceContext | None] = lambda: None


class Stamps:
    """The last timestamp per stream that this process has seen. A hint only: nothing depends on it being right."""

    def __init__(self, most: int = 100_000) -> None:
        self._last: dict[StreamKey, datetime] = {}
        self._most = most

    def forget(self, streams: Iterable[StreamKey]) -> None:
        """Drop what a wrong clock said about these streams."""
        for stream in streams:
            self._last.pop(stream, None)

    def after(self, stream: StreamKey, now: datetime) -> datetime:
        """The next stamp of a stream: now, or just after the last one where that is later."""
        last = self._last.get(stream)
        stamp = now if last is None or now > last else last + MICROSECOND
        self.seen(stream, stamp)
        return stamp

    def seen(self, stream: StreamKey, stamp: datetime) -> None:
        """Remember a stamp."""
        if len(self._last) >= self._most:
            self._last.clear()
        self._last[stream] = stamp


@dataclass(frozen=True, slots=True)
class _Draft:
    """An event with everything filled in but what the append gives it: stamp, version, position."""

    event: RecordedEvent
    stream: StreamKey
    payload_json: bytes
    metadata_json: bytes
    given_key: str | None
    topic: str | None
    traceparent: str


def append_steps(
    events: Iterable[Event], settings: AppendSettings, stamps: Stamps, *, expected: Expected = ANY, again: bool = False
) -> Steps:
    """The statements of one publish; returns what was recorded.

    ``again`` says that an earlier attempt with these events had an unknown outcome: they are looked up first, and the
    earlier attempt can no longer take effect later.

    Raises:
        ValidationError, PayloadInvalid, EventTooLarge: before anything is sent.
        WrongExpectedVersion, ClockAhead, IdempotencyKeyReused: nothing was written, the transaction is still usable.
    """
    drafts = prepare(events, settings)
    _check_expected(expected, drafts)
    found: dict[int, RecordedEvent] = {}
    written: dict[int, RecordedEvent] = {}
    transaction_id: int | None = None
    left = dict(enumerate(drafts))
    for _ in range(_TRIES):
        if not left:
            break
        batch = _Batch(left, settings, stamps, expected)
        rows = yield blocks("store")["append"], batch.arguments(again)
        outcome = rows[0][0]
        if outcome == "appended":
            transaction_id = int(rows[0][6])
            written = batch.recorded(rows)
            break
        if outcome == "duplicate":
            originals = yield SELECT + blocks("store")["by_ids"], ([row[7] for row in rows],)
            found |= _originals(batch, rows, originals)
            left = {place: draft for place, draft in left.items() if place not in found}
        else:
            _refuse_or_restamp(batch, rows, settings, stamps, expected)
    else:
        raise AppendError(f"{_TRIES} attempts met a newer timestamp each time.", cure="publish again.")
    result = Published((found | written)[place] for place in range(len(drafts)))
    result.transaction_id = transaction_id
    return result


def prepare(events: Iterable[Event], settings: AppendSettings) -> list[_Draft]:
    """Check the events and write their JSON; nothing is sent yet."""
    trace = settings.current_trace() or TraceContext.new()
    drafts = [_draft(event, settings, trace) for event in events]
    if len(drafts) > MAX_BATCH:
        raise ValidationError(f"{len(drafts)} events in one publish.", cure=f"publish at most {MAX_BATCH} at a time.")
    keys = [(d.event.tenant_id, d.given_key) for d in drafts if d.given_key is not None]
    if len(set(keys)) != len(keys):
        raise ValidationError("Two events of one publish have the same idempotency_key.", cure="a key names one event.")
    return drafts


def _draft(event: Event, settings: AppendSettings, trace: TraceContext) -> _Draft:
    version = event.schema_version or settings.models.latest(event.event_type) or 1
    payload = check_payload(event.payload, settings.models.of(event.event_type, version))
    recorded = RecordedEvent(
        event_id=event.event_id,
        event_type=event.event_type,
        schema_version=version,
        payload=payload,
        tenant_id=event.tenant_id,
        aggregate_type=event.aggregate_type,
        aggregate_id=event.aggregate_id,
        service_id=event.service_id or settings.service_id,
        correlation_id=event.correlation_id,
        causation_id=event.causation_id,
        idempotency_key=event.idempotency_key or str(event.event_id),
        trace=event.trace or trace,
        baggage=event.baggage,
        metadata=event.metadata,
        timestamp=event.occurred_at,
        occurred_at=event.occurred_at,
    )
    return _Draft(
        event=recorded,
        stream=recorded.stream,
        payload_json=to_json("payload", payload, MAX_PAYLOAD_BYTES),
        metadata_json=to_json("metadata", event.metadata, MAX_METADATA_BYTES) if event.metadata else b"{}",
        given_key=event.idempotency_key,
        topic=settings.route(event) if settings.route else None,
        traceparent=recorded.trace.traceparent,
    )


# Completes an event in place. Nobody but the append has seen it yet, and a copy of its twenty fields costs more than
# all the rest.
_set = object.__setattr__


class _Batch:
    """Stamped events, grouped by stream, as the arrays of ``soma.append``."""

    def __init__(
        self, drafts: Mapping[int, _Draft], settings: AppendSettings, stamps: Stamps, expected: Expected
    ) -> None:
        self.now = settings.clock()
        self.settings = settings
        self.places = list(drafts)
        self.drafts = list(drafts.values())
        self.events = [draft.event for draft in self.drafts]
        for draft in self.drafts:
            _set(draft.event, "timestamp", stamps.after(draft.stream, self.now))
        self.streams = sorted({draft.stream for draft in self.drafts})
        self.expected = [_expected(expected, stream) for stream in self.streams]

    def arguments(self, again: bool) -> list[Any]:
        """The arguments, in the order of the function's parameters."""
        index = {stream: number for number, stream in enumerate(self.streams, 1)}
        counts = [0] * len(self.streams)
        first: list[datetime | None] = [None] * len(self.streams)
        last: list[datetime | None] = [None] * len(self.streams)
        numbers, offsets = [], []
        for draft in self.drafts:
            number = index[draft.stream]
            counts[number - 1] += 1
            last[number - 1] = draft.event.timestamp
            first[number - 1] = first[number - 1] or draft.event.timestamp
            numbers.append(number)
            offsets.append(counts[number - 1])
        keys = [kafka_key(stream) for stream in self.streams]
        return [
            [event.service_id for event in self.events],
            self.now,
            [stream.tenant_id for stream in self.streams],
            [stream.aggregate_type for stream in self.streams],
            [stream.aggregate_id for stream in self.streams],
            [key_hash for _, key_hash in keys],
            self.expected,
            counts,
            first,
            last,
            numbers,
            offsets,
            *self._event_columns(),
            *self._outbox_columns([key for key, _ in keys]),
            again,
        ]

    def _event_columns(self) -> list[Any]:
        events, drafts = self.events, self.drafts
        given = [draft.given_key for draft in drafts]
        return [
            [event.event_id for event in events],
            [event.event_type for event in events],
            [event.schema_version for event in events],
            [event.correlation_id for event in events],
            [event.causation_id for event in events],
            given if any(key is not None for key in given) else None,
            [draft.traceparent for draft in drafts],
            [event.trace.tracestate for event in events],
            [event.baggage for event in events],
            [event.timestamp for event in events],
            [event.occurred_at for event in events],
            [draft.payload_json.decode() for draft in drafts],
            [draft.metadata_json.decode() for draft in drafts],
        ]

    def _outbox_columns(self, keys: list[bytes]) -> list[Any]:
        if self.settings.route is None:
            return [None, None, None, None]
        encode, content_type = self.settings.codec.encode, self.settings.codec.content_type
        values = [encode(event, draft.payload_json) for event, draft in zip(self.events, self.drafts, strict=True)]
        headers = [_headers(draft, content_type) for draft in self.drafts]
        return [[draft.topic for draft in self.drafts], keys, values, headers]

    def recorded(self, rows: Sequence[Sequence[Any]]) -> dict[int, RecordedEvent]:
        """The events with what the database gave them."""
        for event, row in zip(self.events, rows, strict=True):
            _set(event, "position", row[2])
            _set(event, "version", row[3])
            _set(event, "recorded_at", row[5])
        return dict(zip(self.places, self.events, strict=True))


def _headers(draft: _Draft, content_type: str) -> str:
    headers = {"content-type": content_type, "traceparent": draft.traceparent}
    if draft.event.trace.tracestate:
        headers["tracestate"] = draft.event.trace.tracestate
    if draft.event.baggage:
        headers["baggage"] = draft.event.baggage
    return orjson.dumps(headers).decode()


def _expected(expected: Expected, stream: StreamKey) -> int:
    return expected if isinstance(expected, int) else expected.get(stream, ANY)


def _check_expected(expected: Expected, drafts: Sequence[_Draft]) -> None:
    versions = [expected] if isinstance(expected, int) else list(expected.values())
    for version in versions:
        if not ANY <= version < 2**63:
            raise ValidationError(
                f"{version} is not an expected version.", cure="use ANY, EXISTS, NO_STREAM, or 1, 2, …"
            )
    if not isinstance(expected, int) and (unknown := set(expected) - {draft.stream for draft in drafts}):
        raise ValidationError(
            f"A version is expected of {', '.join(map(str, unknown))}, which no event is for.", cure="check the keys."
        )


def _originals(
    batch: _Batch, rows: Sequence[Sequence[Any]], originals: Sequence[Sequence[Any]]
) -> dict[int, RecordedEvent]:
    """The first records of duplicates, by place; refuses a key that now comes with another kind of event."""
    by_id: dict[UUID, RecordedEvent] = {event.event_id: event for event in map(recorded_event, originals)}
    found: dict[int, RecordedEvent] = {}
    for row in rows:
        new, first = batch.events[row[1] - 1], by_id.get(row[7])
        if first is None:
            raise AppendError(
                f"The event of idempotency key {new.idempotency_key!r} is no longer in the log.",
                cure="it was recorded once and expired since; treat it as published.",
            )
        if (first.stream, first.event_type) != (new.stream, new.event_type):
            raise IdempotencyKeyReused(
                f"Idempotency key {new.idempotency_key!r} belongs to a {first.event_type} of stream {first.stream}, "
                f"not to this {new.event_type} of {new.stream}.",
                cure="use a key of its own for each event.",
            )
        found[batch.places[row[1] - 1]] = first
    return found


def _refuse_or_restamp(
    batch: _Batch, rows: Sequence[Sequence[Any]], settings: AppendSettings, stamps: Stamps, expected: Expected
) -> None:
    for outcome, ordinal, _, version, stamp, *_ in rows:
        if outcome == "clock_ahead":
            stamps.forget(batch.streams)
            ahead = (batch.now - stamp).total_seconds()
            raise ClockAhead(f"This machine's clock is {ahead:.0f} s ahead of the database's.", cure="set the clock.")
        stream = batch.streams[ordinal - 1]
        if outcome == "wrong_version":
            wanted = batch.expected[ordinal - 1]
            raise WrongExpectedVersion(str(stream), _EXPECTED_NAMES.get(wanted, f"version {wanted}"), version)
        stamps.seen(stream, stamp)
