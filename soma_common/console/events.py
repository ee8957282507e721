"""Recorded events: lists by what they have in common, one event whole, and one stream from its beginning."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import Response

from soma_common.console.rendering import coloured
from soma_common.console.security import Refused
from soma_common.console.values import download, plain_json
from soma_common.console.web import Ask, Page
from soma_common.errors import EventsArchived, ValidationError
from soma_common.events.keys import stream_key
from soma_common.events.models import RecordedEvent
from soma_common.events.store import EventFilter

_PAGE: Final = 50
_STREAM: Final = 100
FIELDS: Final = ("event_type", "aggregate_type", "aggregate_id", "service_id", "trace_id", "correlation_id", "event_id")
_ENVELOPE: Final = (
    "position", "version", "event_id", "event_type", "schema_version", "tenant_id", "aggregate_type", "aggregate_id",
    "service_id", "correlation_id", "causation_id", "idempotency_key", "trace_id", "timestamp", "occurred_at",
    "recorded_at", "baggage", "metadata", "payload",
)  # fmt: skip


async def found(ask: Ask) -> Response:
    """Events of a filter, page by page."""
    oldest = ask.word("order") == "oldest"
    given = EventFilter(
        tenant_id=ask.tenant, since=ask.moment("since"), until=ask.moment("until"),
        **{name: ask.word(name) for name in FIELDS},
    )  # fmt: skip
    page = await ask.backend.store.query(given, limit=_PAGE, after=ask.number("cursor"), newest_first=not oldest)
    wanted = {name: ask.word(name) for name in (*FIELDS, "since", "until")}
    return ask.page(
        "events.html", page=page, wanted=wanted, oldest=oldest, paged=ask.word("cursor") is not None,
        letters=await letters_of(ask, page),
    )  # fmt: skip


async def one(ask: Ask) -> Response:
    """One event, whole."""
    event = await event_of(ask)
    letters = await ask.backend.fetch("letters_of_events", [event.event_id])
    return ask.page("event.html", event=event, letters=letters, payload=coloured(event.payload))


async def whole(ask: Ask) -> Response:
    """One event as a file."""
    event = await event_of(ask)
    text = plain_json({name: getattr(event, name) for name in _ENVELOPE})
    return download(text.encode(), f"event-{event.event_id}.json", "application/json")


async def stream(ask: Ask) -> Response:
    """A stream: what happened to one thing, in order."""
    kind, name, tenant = ask.word("aggregate_type"), ask.word("aggregate_id"), ask.tenant
    if not isinstance(tenant, str):
        raise Refused(400, "Whose stream?", "choose a tenant.")
    if kind is None or name is None:
        raise Refused(400, "Which stream?", "name an aggregate type and an aggregate id.")
    key, start = stream_key(tenant, kind, name), ask.number("from", 1) or 1
    store, events, gone = ask.backend.store, list[RecordedEvent](), ""
    try:
        async for event in store.read(key, from_version=start, page=_STREAM + 1):
            events.append(event)
            if len(events) > _STREAM:
                break
    except EventsArchived as error:
        gone = error.message
    version = await store.stream_version(key)
    shown = events[:_STREAM]
    return ask.page(
        "stream.html", key=key, events=shown, version=version, start=start, gone=gone, step=_STREAM,
        more=events[_STREAM].version if len(events) > _STREAM else None, letters=await letters_of(ask, shown),
        payloads=[coloured(event.payload) if len(plain_json(event.payload)) < 4000 else None for event in shown],
    )  # fmt: skip


async def event_of(ask: Ask) -> RecordedEvent:
    """The event of the path.

    Raises:
        Refused: there is none, or it is somebody else's: nobody is told which.
    """
    try:
        page = await ask.backend.store.query(EventFilter(tenant_id=ask.tenant, event_id=ask.path("event")), limit=1)
    except ValidationError as error:
        raise Refused(404, "There is no such event.", "check its id.") from error
    if not page:
        raise Refused(404, "There is no such event.", "check its id and its tenant; it may be in the archive.")
    event: RecordedEvent = page[0]
    return event


async def letters_of(ask: Ask, events: Any) -> dict[Any, Any]:
    """The letter of each of these events that failed somewhere; the last one where there are several."""
    rows = await ask.backend.fetch("letters_of_events", [event.event_id for event in events]) if events else []
    return {row[0]: row for row in rows}


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/events", "GET", found),
    ("/events/{event}", "GET", one),
    ("/events/{event}/file", "GET", whole),
    ("/stream", "GET", stream),
)
