"""The append without I/O: prepares the arguments of ``soma.append`` and reads its answers.

A generator yields a statement and is sent its rows, so that asyncpg, psycopg (sync and async) and Django share it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from operator import attrgetter
from typing import Any, Protocol
from uuid import UUID

import orjson

from soma_common.clock import MICROSECOND, Clock, utc_now
from soma_common.errors import AppendError, ClockAhead, IdempotencyKeyReused, ValidationError, WrongExpectedVersion
from soma_common.events.codec import Codec, JsonCodec
from soma_common.events.ids import uuid_text
from soma_common.events.keys import StreamKey, kafka_key
from soma_common.events.models import ANY, EXISTS, NO_STREAM, NOT_RECORDED, Event, RecordedEvent, sealed, unsealed
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
_APPEND, _BY_IDS = blocks("store")["append"], SELECT + blocks("store")["by_ids"]
_EXPECTED_NAMES = {ANY: "any version", EXISTS: "any existing version", NO_STREAM: "no stream"}


class Published(tuple[RecordedEvent, ...]):
    """The recorded events, in the order in which they were given.

    ``transaction_id`` is the PostgreSQL transaction that wrote them (None when all of them were there already): if the
    caller's COMMIT is lost, ``EventStore.outcome(published)`` tells how it ended.
    """

    transaction_id: int | None = None


class Spans(Protocol):
    """What a store shows of its work to a tracer."""

    @property
    def active(self) -> bool:
        """Whether anybody wants to see it."""

    def appending(
        self, events: Sequence[Any], topics: Sequence[str | None], fresh: TraceContext | None
    ) -> AbstractContextManager[None]:
        """Around the statements that record these drafts; they get the traces that travel with them.
        ``fresh`` was just made, for those that had none: it is nobody's span."""

    def transaction(self) -> AbstractContextManager[Any]:
        """Around a transaction that was given no name."""


@dataclass(frozen=True, slots=True)
class AppendSettings:
    """What every append of a store shares.

    ``route`` gives the Kafka topic of an event, or None where no outbox row is wanted. ``current_trace`` gives the
    trace that events without one of their own join; where there is none, each publish begins a new one. ``spans``
    shows appends to a tracer.
    """

    service_id: str
    models: PayloadModels = field(default_factory=PayloadModels)
    codec: Codec = field(default_factory=JsonCodec)
    route: Callable[[Event], str] | None = None
    clock: Clock = utc_now
    current_trace: Callable[[], TraceContext | None] = lambda: None
    spans: Spans | None = None


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
        if last is None:
            self.seen(stream, stamp)
        else:
            self._last[stream] = stamp
        return stamp

    def seen(self, stream: StreamKey, stamp: datetime) -> None:
        """Remember a stamp."""
        if len(self._last) >= self._most:
            self._last.clear()
        self._last[stream] = stamp


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
    known = settings.current_trace()
    trace = known or TraceContext.new()
    drafts = prepare(events, settings, trace)
    _check_expected(expected, drafts)
    if not drafts:
        return Published()
    spans = settings.spans
    if spans is None or not spans.active:
        return (yield from _append(drafts, settings, stamps, expected=expected, again=again))
    with spans.appending([draft[1] for draft in drafts], [draft[5] for draft in drafts], None if known else trace):
        return (yield from _append(drafts, settings, stamps, expected=expected, again=again))


def _append(
    drafts: list[_Draft], settings: AppendSettings, stamps: Stamps, *, expected: Expected, again: bool
) -> Steps:
    batch = _Batch(drafts, settings)
    found: dict[int, RecordedEvent] = {}
    for _ in range(_TRIES):
        batch.stamp(stamps)
        rows = yield _APPEND, batch.arguments(expected, again)
        outcome = rows[0][0]
        if outcome == "appended":
            return _published(batch.recorded(rows), found, int(rows[0][6]))
        if outcome == "duplicate":
            originals = yield _BY_IDS, ([row[7] for row in rows],)
            found |= _originals(batch, rows, originals)
            drafts = [draft for draft in drafts if draft[0] not in found]
            if not drafts:
                return _published([], found, None)
            batch = _Batch(drafts, settings)
        else:
            _refuse_or_restamp(batch, rows, stamps, expected)
    raise AppendError(f"{_TRIES} attempts met a newer timestamp each time.", cure="publish again.")


def answer(steps: Steps, rows: Sequence[Sequence[Any]]) -> Statement | Published:
    """Hand the rows of a statement over: the next statement, or the end of the publish."""
    try:
        return steps.send(rows)
    except StopIteration as done:
        result: Published = done.value
        return result


def _published(
    written: list[RecordedEvent], found: Mapping[int, RecordedEvent], transaction_id: int | None
) -> Published:
    """What was written, with what was found in its places."""
    for place in sorted(found):
        written.insert(place, found[place])
    result = Published(written)
    result.transaction_id = transaction_id
    return result


# An event with everything filled in but what the append gives it: its place in the publish, the event, its payload
# and its metadata as JSON, the idempotency key if one was given, the topic. A plain tuple: there is one per event.
_Draft = tuple[int, RecordedEvent, bytes, str, str | None, str | None]


def prepare(events: Iterable[Event], settings: AppendSettings, trace: TraceContext) -> list[_Draft]:
    """Check the events and write their JSON; nothing is sent yet. ``trace`` is that of events without one."""
    drafts = [_draft(place, event, settings, trace) for place, event in enumerate(events)]
    if len(drafts) > MAX_BATCH:
        raise ValidationError(f"{len(drafts)} events in one publish.", cure=f"publish at most {MAX_BATCH} at a time.")
    keys = [(event.tenant_id, given_key) for _, event, _, _, given_key, _ in drafts if given_key is not None]
    if keys and len(set(keys)) != len(keys):
        raise ValidationError("Two events of one publish have the same idempotency_key.", cure="a key names one event.")
    return drafts


def _draft(place: int, event: Event, settings: AppendSettings, trace: TraceContext) -> _Draft:
    event_type, given_key, metadata = event.event_type, event.idempotency_key, event.metadata
    version = event.schema_version or settings.models.latest(event_type) or 1
    payload = check_payload(event.payload, settings.models.of(event_type, version))
    recorded = _recorded(event, payload, version)
    recorded.service_id = event.service_id or settings.service_id
    recorded.idempotency_key = given_key or uuid_text(event.event_id)
    recorded.trace = event.trace or trace
    payload_json = to_json("payload", payload, MAX_PAYLOAD_BYTES)
    metadata_json = to_json("metadata", metadata, MAX_METADATA_BYTES).decode() if metadata else "{}"
    return place, recorded, payload_json, metadata_json, given_key, settings.route(event) if settings.route else None


def _recorded(event: Event, payload: Any, version: int) -> Any:
    """The event as it will be recorded, with what it says itself."""
    draft = unsealed()
    draft.event_id = event.event_id
    draft.event_type = event.event_type
    draft.schema_version = version
    draft.payload = payload
    draft.tenant_id = event.tenant_id
    draft.aggregate_type = event.aggregate_type
    draft.aggregate_id = event.aggregate_id
    draft.correlation_id = event.correlation_id
    draft.causation_id = event.causation_id
    draft.baggage = event.baggage
    draft.metadata = event.metadata
    draft.timestamp = draft.occurred_at = event.occurred_at
    draft.version, draft.position, draft.recorded_at = 0, 0, NOT_RECORDED
    return draft


# What the arrays take from an event as it is, in their order.
_FIELDS = attrgetter(
    "service_id", "event_id", "event_type", "schema_version", "correlation_id", "causation_id",
    "trace.tracestate", "baggage", "timestamp", "occurred_at",
)  # fmt: skip


def _columns(rows: Iterable[Sequence[Any]]) -> Iterable[list[Any]]:
    """Rows turned into columns, without a step of Python per cell."""
    return map(list, zip(*rows, strict=True))


class _Batch:
    """Drafts, grouped by stream, as the arrays of ``soma.append``."""

    def __init__(self, drafts: Sequence[_Draft], settings: AppendSettings) -> None:
        self.settings = settings
        self.places, self.events, self.payloads, self.metadata, self.given, self.topics = _columns(drafts)
        self.stream_of = [event.stream for event in self.events]
        groups: dict[StreamKey, list[Any]] = {}
        for stream, event in zip(self.stream_of, self.events, strict=True):
            groups.setdefault(stream, []).append(event)
        self.streams = sorted(groups)
        self.groups = [groups[stream] for stream in self.streams]

    def stamp(self, stamps: Stamps) -> None:
        """Give each event its stamp: now, and rising within its stream."""
        self.now = now = self.settings.clock()
        for stream, events in zip(self.streams, self.groups, strict=True):
            for event in events:
                event.timestamp = stamps.after(stream, now)

    def arguments(self, expected: Expected, again: bool) -> list[Any]:
        """The arguments, in the order of the function's parameters."""
        groups = self.groups
        tenants, types, ids = _columns(self.streams)
        keys, hashes = _columns(map(kafka_key, self.streams))
        services, *fields = _columns(map(_FIELDS, self.events))
        parents, headers = _trace_columns(self.events, self.settings.codec.content_type)
        return [
            services,
            self.now,
            tenants,
            types,
            ids,
            hashes,
            _expected_column(expected, self.streams),
            list(map(len, groups)),
            [events[0].timestamp for events in groups],
            [events[-1].timestamp for events in groups],
            *self._places(),
            *fields[:5],
            self.given if any(self.given) else None,
            parents,
            *fields[5:],
            list(map(bytes.decode, self.payloads)),
            self.metadata,
            *(self._outbox_columns(keys, headers) if self.settings.route else (None, None, None, None)),
            again,
        ]

    def _places(self) -> tuple[list[int], list[int]]:
        """The number of each event's stream, and the event's own number within it; both from 1."""
        if len(self.streams) == 1:
            return [1] * len(self.events), list(range(1, len(self.events) + 1))
        index = {stream: number for number, stream in enumerate(self.streams, 1)}
        numbers = [index[stream] for stream in self.stream_of]
        if len(self.streams) == len(self.events):
            return numbers, [1] * len(numbers)
        counts = [0] * (len(index) + 1)
        offsets = []
        for number in numbers:
            counts[number] += 1
            offsets.append(counts[number])
        return numbers, offsets

    def _outbox_columns(self, keys: list[bytes], headers: list[str]) -> list[Any]:
        encode = self.settings.codec.encode
        values = list(map(encode, self.events, self.payloads))
        return [self.topics, keys, values, headers]

    def recorded(self, rows: Sequence[Sequence[Any]]) -> list[RecordedEvent]:
        """The events with what the database gave them; from now on they are values."""
        for draft, row in zip(self.events, rows, strict=True):
            draft.position, draft.version, draft.recorded_at = row[2], row[3], row[5]
        return list(map(sealed, self.events))


def _trace_columns(events: Sequence[RecordedEvent], content_type: str) -> tuple[list[str], list[str]]:
    """The traceparent and the record's headers of each event. One after another they are mostly of one trace."""
    parents, headers = [], []
    trace = baggage = None
    for event in events:
        if event.trace is not trace or event.baggage is not baggage:
            trace, baggage = event.trace, event.baggage
            parent = trace.traceparent
            header = _headers(content_type, parent, trace.tracestate, baggage)
        parents.append(parent)
        headers.append(header)
    return parents, headers


def _headers(content_type: str, traceparent: str, tracestate: str | None, baggage: str | None) -> str:
    headers = {"content-type": content_type, "traceparent": traceparent}
    if tracestate:
        headers["tracestate"] = tracestate
    if baggage:
        headers["baggage"] = baggage
    return orjson.dumps(headers).decode()


def _expected_column(expected: Expected, streams: Sequence[StreamKey]) -> list[int]:
    return [expected] * len(streams) if isinstance(expected, int) else [expected.get(key, ANY) for key in streams]


def _check_expected(expected: Expected, drafts: Sequence[_Draft]) -> None:
    versions = [expected] if isinstance(expected, int) else expected.values()
    for version in versions:
        if not ANY <= version < 2**63:
            raise ValidationError(
                f"{version} is not an expected version.", cure="use ANY, EXISTS, NO_STREAM, or 1, 2, …"
            )
    if not isinstance(expected, int) and (unknown := set(expected) - {event.stream for _, event, *_ in drafts}):
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


def _refuse_or_restamp(batch: _Batch, rows: Sequence[Sequence[Any]], stamps: Stamps, expected: Expected) -> None:
    for outcome, ordinal, _, version, last, *_ in rows:
        if outcome == "clock_ahead":
            stamps.forget(batch.streams)
            ahead = (batch.now - last).total_seconds()
            raise ClockAhead(f"This machine's clock is {ahead:.0f} s ahead of the database's.", cure="set the clock.")
        stream = batch.streams[ordinal - 1]
        if outcome == "wrong_version":
            wanted = expected if isinstance(expected, int) else expected.get(stream, ANY)
            raise WrongExpectedVersion(str(stream), _EXPECTED_NAMES.get(wanted, f"version {wanted}"), version)
        stamps.seen(stream, last)
