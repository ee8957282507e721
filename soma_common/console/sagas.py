"""Sagas: lists, one with its timeline and its definition as a graph, and what people do to it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, Final

import orjson
from starlette.responses import Response

from soma_common.console.drawing import Picture, picture
from soma_common.console.live import Parts, live
from soma_common.console.rendering import coloured
from soma_common.console.security import Refused
from soma_common.console.values import download, plain_json
from soma_common.console.web import Ask, Page
from soma_common.errors import SagaNotFound, SomaError, ValidationError
from soma_common.sagas.graph import boxes_of, boxes_of_shape
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.timeline import Sign, Timeline, error_of, stuck_at, value_of, where
from soma_common.sagas.views import ACTIVE, SagaFilter, SagaView

log = logging.getLogger(__name__)

_PAGE: Final = 50
_LINES: Final = 400  # of a timeline
_SIGNS: Final = {
    Sign.DONE: "✓", Sign.SKIPPED: "↷", Sign.FAILED: "✗", Sign.RETRYING: "↻", Sign.UNKNOWN: "?", Sign.WAITING: "…",
    Sign.UNDONE: "↶", Sign.TURNED: "↩", Sign.STUCK: "■", Sign.ENDED: "●", Sign.PERSON: "☞",
}  # fmt: skip


async def found(ask: Ask) -> Response:
    """Sagas of a filter, the newest first; without a status: those that did not end."""
    statuses = ask.words("status")
    chosen = None if "all" in statuses else statuses or list(ACTIVE)
    names = ("name", "saga_key", "correlation_id")
    given = SagaFilter(
        tenant_id=ask.tenant, statuses=chosen, since=ask.moment("since"), until=ask.moment("until"),
        **{name: ask.word(name) for name in names},
    )  # fmt: skip
    page = await ask.backend.sagas.list(given, cursor=ask.word("cursor"), limit=_PAGE)
    wanted: dict[str, Any] = {name: ask.word(name) for name in (*names, "since", "until")} | {"status": statuses}
    known = sorted({each.name for each in await ask.backend.sagas.known()})
    return ask.page(
        "sagas.html", page=page, wanted=wanted, statuses=list(SagaStatus), where=where, known=known, error_of=error_of,
        paged=ask.word("cursor") is not None,
    )  # fmt: skip


async def one(ask: Ask) -> Response:
    """One saga."""
    view = await saga_of(ask)
    return ask.page("saga.html", **await _shown(ask, view))


async def watch(ask: Ask) -> Response:
    """The same, while it goes on."""
    view = await saga_of(ask)
    ended = [view.ended_at]

    async def look() -> Parts:
        now = await ask.backend.sagas.get_saga(view.saga_id)
        ended[0] = now.ended_at
        return {"saga": ask.part("saga_part.html", **await _shown(ask, now))}

    return live(ask, look, every=1.0, until=lambda: ended[0] is not None)


async def _shown(ask: Ask, view: SagaView) -> dict[str, Any]:
    lines = Timeline(view.journal).lines
    at = stuck_at(view, view.journal)
    return {
        "saga": view, "lines": lines[-_LINES:], "left_out": max(0, len(lines) - _LINES), "signs": _SIGNS,
        "stuck": view.status is SagaStatus.STUCK, "at": at, "turned": any(line.sign is Sign.TURNED for line in lines),
        "drawn": await _drawn(ask, view), "where": where, "error_of": error_of, "value_of": value_of,
        "given": coloured(view.input), "result": None if view.result is None else coloured(view.result),
        "stack": next((entry.stack for entry in reversed(view.journal) if entry.stack), None),
        "turns": view.version > 0 and view.status in (SagaStatus.PENDING, SagaStatus.RUNNING, SagaStatus.STUCK),
    }  # fmt: skip


async def _drawn(ask: Ask, view: SagaView) -> Picture | None:
    """The definition with how each step stands."""
    states: dict[str, str] = {}
    for line in Timeline(view.journal).lines:
        if line.step:
            states[line.step.rpartition("/")[2]] = line.sign.value
    return await _picture(ask, view.name, view.version, states)


async def _picture(ask: Ask, name: str, version: int, states: dict[str, str] | None = None) -> Picture | None:
    for saga in ask.backend.definitions:
        if saga.key == (name, version):
            return picture(f"{name} v{version}", boxes_of(saga), states)
    for known in await ask.backend.sagas.known():
        if (known.name, known.version) == (name, version):
            try:
                return picture(f"{name} v{version}", boxes_of_shape(name, known.shape), states)
            except SomaError as error:
                log.info("Saga %s cannot be drawn: %s", name, error)
    return None


async def definitions(ask: Ask) -> Response:
    """The definitions that workers have, or had."""
    ask.must_see_all()
    return ask.page("definitions.html", known=await ask.backend.sagas.known())


async def definition(ask: Ask) -> Response:
    """A definition as a graph."""
    ask.must_see_all()
    name, version = ask.path("name"), ask.path("version")
    drawn = (
        await _picture(ask, name, int(version))
        if version.isascii() and version.isdigit() and len(version) < 9
        else None
    )
    if drawn is None:
        raise Refused(404, "There is no such definition, or it cannot be drawn.", "start the console with --app.")
    with_undo = any(saga.key == (name, int(version)) for saga in ask.backend.definitions)
    return ask.page("definition.html", name=name, version=int(version), drawn=drawn, with_undo=with_undo)


async def act(ask: Ask) -> Response:
    """Do something to a saga: retry, skip, resolve, compensate, cancel."""
    reason, view, verb = ask.reason(), await saga_of(ask), ask.path("verb")
    sagas, who = ask.backend.sagas, ask.person.who
    if verb == "retry":
        await sagas.retry(view.saga_id, why=reason, who=who)
        said = "It is tried again."
    elif verb == "skip":
        await sagas.skip(view.saga_id, why=reason, who=who)
        said = "It is passed over."
    elif verb == "resolve":
        happened = ask.form.get("happened") == "yes"
        await sagas.resolve(
            view.saga_id, happened=happened, why=reason, result=_result(ask) if happened else None, who=who
        )
        said = (
            "It is said that it happened." if happened else "It is said that it did not happen: the saga turns around."
        )
    elif verb in ("compensate", "cancel"):
        ask_it = sagas.compensate if verb == "compensate" else sagas.cancel
        done = await ask_it(view.saga_id, reason=reason, who=who)
        said = "It turns around." if done else "Nothing to do: that was asked for before."
    else:
        raise Refused(404, "There is no such verb.", "use the forms of the page.")
    ask.did(f"saga {verb}", saga=str(view.saga_id), reason=reason)
    return ask.back(f"/sagas/{view.saga_id}", said)


def _result(ask: Ask) -> Any:
    text = ask.form.get("result", "").strip()
    if not text:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValidationError(
            f"The result is not JSON: {error}.", cure='write it as {"paid": 5}, "text", 5.'
        ) from error


async def whole(ask: Ask) -> Response:
    """A saga as a file."""
    view = await saga_of(ask)
    return download(plain_json(asdict(view)).encode(), f"saga-{view.saga_id}.json", "application/json")


async def saga_of(ask: Ask) -> SagaView:
    """The saga of the path.

    Raises:
        Refused: there is none, or it is somebody else's: nobody is told which.
    """
    none = Refused(404, "There is no such saga.", "check its id, and whose it is.")
    try:
        view = await ask.backend.sagas.get_saga(ask.path("saga"))
    except (ValidationError, SagaNotFound) as error:
        raise none from error
    ask.must_see(view.tenant_id, none)
    return view


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/sagas", "GET", found),
    ("/sagas/{saga}", "GET", one),
    ("/sagas/{saga}/file", "GET", whole),
    ("/sagas/{saga}/{verb}", "POST", act),
    ("/live/sagas/{saga}", "GET", watch),
    ("/definitions", "GET", definitions),
    ("/definitions/{name}/{version}", "GET", definition),
)
