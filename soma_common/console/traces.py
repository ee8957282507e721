"""What belongs together: a trace as a waterfall, a business transaction as a tree of causes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Final
from uuid import UUID

from starlette.responses import Response

from soma_common.console.events import letters_of
from soma_common.console.security import Refused
from soma_common.console.web import Ask, Page
from soma_common.errors import ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.events.store import EventFilter
from soma_common.sagas.timeline import Sign, Timeline
from soma_common.sagas.views import SagaFilter, SagaView

MOST: Final = 300  # events that are drawn
_SAGAS: Final = 10
_WIDE: Final = 1000.0  # units of a waterfall's width
_THIN: Final = 3.0


@dataclass(slots=True)
class Node:
    """Something that happened, and what it led to."""

    kind: str  # event, saga or step
    title: str
    began: datetime
    ended: datetime
    path: str
    detail: str = ""
    sign: str = ""
    parent: str | None = None
    names: tuple[str, ...] = ()
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a waterfall: where its bar begins and how long it is, of 1000."""

    node: Node
    depth: int
    left: float
    width: float
    offset: timedelta
    last: bool = False


async def trace(ask: Ask) -> Response:
    """A trace: everything that one request led to, by time."""
    try:
        given = EventFilter(tenant_id=ask.tenant, trace_id=ask.path("trace"))
        page = await ask.backend.store.query(given, limit=MOST)
    except ValidationError as error:
        raise Refused(404, "This is no trace.", "it has 32 hexadecimal digits.") from error
    found = list(page)
    hint = ask.word("correlation")  # sagas are not found by their traces
    correlations = list(dict.fromkeys([*([hint] if hint else []), *(event.correlation_id for event in found)]))
    sagas = [saga for saga in await _sagas(ask, correlations) if saga.trace_id == ask.path("trace")]
    return await _together(ask, "trace.html", found, sagas, more=page.next_after is not None, name=ask.path("trace"))


async def correlation(ask: Ask) -> Response:
    """A business transaction: what led to what."""
    name = ask.word("id")
    if name is None:
        raise Refused(400, "Which one?", "name a correlation id.")
    page = await ask.backend.store.query(EventFilter(tenant_id=ask.tenant, correlation_id=name), limit=MOST)
    sagas = await _sagas(ask, [name])
    return await _together(ask, "correlation.html", list(page), sagas, more=page.next_after is not None, name=name)


async def _together(
    ask: Ask, template: str, events: Sequence[RecordedEvent], sagas: Sequence[SagaView], *, more: bool, name: str
) -> Response:
    if not events and not sagas:
        raise Refused(404, "There is nothing of it.", "check the id and the tenant; it may be in the archive.")
    letters = await letters_of(ask, events)
    nodes = [_of_event(ask, event, letters) for event in events]
    for saga in sagas:
        nodes += _of_saga(ask, saga)
    roots = tree(nodes)
    return ask.page(
        template, rows=list(walk(roots)), bars=waterfall(roots), events=events, sagas=sagas, more=more, most=MOST,
        name=name,        traces=list(dict.fromkeys(event.trace_id for event in events)),
        correlations=list(dict.fromkeys(event.correlation_id for event in events))[:20],
        total=_length(nodes),
    )  # fmt: skip


async def _sagas(ask: Ask, correlations: Iterable[str]) -> list[SagaView]:
    found, orchestrator = [], ask.backend.sagas
    for name in islice(correlations, _SAGAS):
        wanted = SagaFilter(tenant_id=ask.tenant, correlation_id=name)
        for saga in (await orchestrator.list(wanted, limit=_SAGAS)).sagas:
            found.append(await orchestrator.get_saga(saga.saga_id))
            if len(found) == _SAGAS:
                return found
    return found


def _of_event(ask: Ask, event: RecordedEvent, letters: dict[UUID, Any]) -> Node:
    letter = letters.get(event.event_id)
    began = min(event.occurred_at, event.recorded_at)
    if event.recorded_at - began > timedelta(hours=1):  # a producer's clock that is wrong, or an old event
        began = event.recorded_at
    return Node(
        "event", event.event_type, began, event.recorded_at, ask.href(f"/events/{event.event_id}"),
        detail=f"{event.aggregate_type}/{event.aggregate_id}@{event.version} · {event.service_id}",
        sign="" if letter is None else f"{letter[2]} at {letter[3]}", parent=event.causation_id,
        names=(str(event.event_id),),
    )  # fmt: skip


def _of_saga(ask: Ask, saga: SagaView) -> list[Node]:
    """A saga and its steps. What a step records is caused by its key, ``saga:step``."""
    path, end = (
        ask.href(f"/sagas/{saga.saga_id}"),
        saga.ended_at or max((e.at for e in saga.journal), default=saga.created_at),
    )
    own = Node("saga", f"{saga.name} v{saga.version}", saga.created_at, end, path, detail=saga.status.value,
               sign="stuck" if saga.status.value == "stuck" else "", names=(str(saga.saga_id),))  # fmt: skip
    steps = []
    for line in Timeline(saga.journal).lines:
        if not line.step or line.sign in (Sign.PERSON,):
            continue
        undo = line.sign is Sign.UNDONE
        began = line.at - timedelta(seconds=line.took or 0)
        steps.append(Node(
            "step", f"undo {line.step}" if undo else line.step, began, line.at, path, detail=line.sign.value,
            sign=line.sign.value if line.sign in (Sign.FAILED, Sign.STUCK, Sign.UNKNOWN) else "",
            parent=str(saga.saga_id), names=() if undo else (f"{saga.saga_id}:{line.step}",),
        ))  # fmt: skip
    return [own, *steps]


def tree(nodes: Sequence[Node]) -> list[Node]:
    """Nodes under what caused them. One whose cause is not here, or is a circle, stands alone."""
    by_name = {name: node for node in nodes for name in node.names}
    roots, placed = [], dict[int, Node]()
    for node in sorted(nodes, key=lambda each: each.began):
        above = by_name.get(node.parent or "")
        step: Node | None = above
        while step is not None and step is not node:
            step = placed.get(id(step))
        if above is None or step is node:
            roots.append(node)
        else:
            placed[id(node)] = above
            above.children.append(node)
    return roots


def walk(roots: Sequence[Node], depth: int = 0) -> Iterable[tuple[Node, int]]:
    """All of a tree, each behind what caused it; without recursion: a chain may be long."""
    left = [(node, depth) for node in reversed(roots)]
    while left:
        node, deep = left.pop()
        yield node, deep
        left += [(child, deep + 1) for child in reversed(node.children)]


def waterfall(roots: Sequence[Node]) -> list[Bar]:
    """Rows with bars on one scale of time."""
    rows = list(walk(roots))
    first = min(node.began for node, _ in rows)
    whole = max((max(node.ended for node, _ in rows) - first).total_seconds(), 1e-6)
    bars = []
    for node, depth in rows:
        left = (node.began - first).total_seconds() / whole * _WIDE
        width = max(_THIN, (node.ended - node.began).total_seconds() / whole * _WIDE)
        bars.append(
            Bar(
                node,
                min(depth, 12),
                round(min(left, _WIDE - _THIN), 2),
                round(min(width, _WIDE), 2),
                node.began - first,
            )
        )
    return bars


def _length(nodes: Sequence[Node]) -> float:
    return (max(node.ended for node in nodes) - min(node.began for node in nodes)).total_seconds()


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/traces/{trace}", "GET", trace),
    ("/correlation", "GET", correlation),
)
