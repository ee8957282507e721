"""Replays: what one would read, beginning it, and pausing, resuming or ending it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any, Final
from uuid import UUID

from starlette.responses import Response

from soma_common.console.live import Parts, live
from soma_common.console.redrives import number_in
from soma_common.console.security import Refused
from soma_common.console.web import Ask, Page
from soma_common.errors import ReplayRefused, SomaError, ValidationError
from soma_common.events.store import ALL_TENANTS
from soma_common.replay.models import Progress, ReplayFilter, ReplayMode, ReplayState

log = logging.getLogger(__name__)

_LISTED: Final = 50
_AT_ONCE: Final = 2  # runs of this process
_MODES: Final = (ReplayMode.MISSING, ReplayMode.FORCE)
_OPEN: Final = (ReplayState.PLANNED, ReplayState.RUNNING, ReplayState.PAUSED, ReplayState.FAILED)
FIELDS: Final = ("event_type", "service_id", "aggregate_type", "aggregate_id", "trace_id")


async def listed(ask: Ask) -> Response:
    """The latest runs."""
    tenant = ask.tenant
    runs = await ask.backend.runs.newest(_LISTED, tenant=None if tenant is ALL_TENANTS else str(tenant))
    return ask.page("replays.html", runs=runs, tenant_of=tenant_of)


async def plan(ask: Ask) -> Response:
    """A form, and (once it is filled in) what a replay would read. Nothing is applied or recorded."""
    names = [row[0] for row in await ask.backend.fetch("consumer_names") if not row[0].startswith(("relay:", "saga:"))]
    consumer, found = ask.word("consumer"), None
    if consumer is not None:
        async with ask.backend.engine(_known(consumer, names)) as engine:
            found = await engine.plan(_wanted(ask), _mode(ask.word("mode")))
    runs_here = ask.backend.app is not None and consumer in ask.backend.app.consumers
    wanted = {name: ask.word(name) for name in (*FIELDS, "since", "until", "consumer", "mode")}
    return ask.page("replay_plan.html", names=names, plan=found, wanted=wanted, modes=_MODES, runs_here=runs_here)


async def start(ask: Ask) -> Response:
    """Record a run; where the console has the consumer's handlers, it runs here."""
    reason, mode = ask.reason(), _mode(ask.word("mode"))
    names = [row[0] for row in await ask.backend.fetch("consumer_names")]
    consumer = _known(ask.word("consumer") or "", names)
    async with ask.backend.engine(consumer) as engine:
        run = await engine.start(
            _wanted(ask), mode, rate=number_in(ask, "rate", None), requested_by=ask.person.who,
            reason=" ".join(reason.split()),
        )  # fmt: skip
    ask.did("replay recorded", run=str(run.run_id), consumer=consumer, mode=mode.value, reason=reason)
    said = "The replay is recorded."
    if _begin(ask, run):
        said = "The replay has begun."
    return ask.back(f"/replays/{run.run_id}", said)


async def show(ask: Ask) -> Response:
    """How a run stands."""
    return ask.page("replay.html", **_shown(ask, await run_of(ask)))


async def watch(ask: Ask) -> Response:
    """The same, while it goes on."""
    run = await run_of(ask)
    state = [run.state]

    async def look() -> Parts:
        now = await ask.backend.runs.find(run.run_id)
        state[0] = now.state
        return {"run": ask.part("replay_part.html", **_shown(ask, now))}

    return live(ask, look, every=1.0, until=lambda: state[0] in (ReplayState.DONE, ReplayState.CANCELLED))


def _shown(ask: Ask, run: Progress) -> dict[str, Any]:
    conditions = {name: value for name, value in run.wanted.conditions().items() if name != "tenant_id"}
    return {
        "run": run, "tenant_of": tenant_of, "is_open": run.state in _OPEN, "here": str(run.run_id) in _tasks(ask),
        "can_run": _can_run(ask, run), "conditions": conditions,
    }  # fmt: skip


async def act(ask: Ask) -> Response:
    """Pause, resume or cancel a run; or let it run here."""
    reason, run, verb = ask.reason(), await run_of(ask), ask.path("verb")
    if verb == "run":
        if not _begin(ask, run):
            raise Refused(
                409, "It cannot run here now.", "start the console with --app, or run it by `somastack events replay`."
            )
    elif verb in ("pause", "resume", "cancel"):
        async with ask.backend.engine(run.consumer) as engine:
            now = await getattr(engine, verb)(run.run_id)
        if verb == "resume":
            _begin(ask, now)
    else:
        raise Refused(404, "There is no such verb.", "use the forms of the page.")
    ask.did(f"replay {verb}", run=str(run.run_id), reason=reason)
    said = {
        "run": "It runs here.",
        "pause": "It is paused.",
        "resume": "It may be run again.",
        "cancel": "It is ended for good.",
    }
    return ask.back(f"/replays/{run.run_id}", said[verb])


async def run_of(ask: Ask) -> Progress:
    """The run of the path, if it is one of a tenant that may be seen.

    Raises:
        Refused: there is none, or it is somebody else's: nobody is told which.
    """
    none = Refused(404, "There is no such replay.", "see the list of replays.")
    try:
        run = await ask.backend.runs.find(UUID(ask.path("run")))
    except (ValueError, ReplayRefused) as error:
        raise none from error
    ask.must_see(tenant_of(run), none)
    return run


def tenant_of(run: Progress) -> str | None:
    """Whose events a run reads; None: everybody's."""
    return run.wanted.tenant_id if isinstance(run.wanted.tenant_id, str) else None


def _tasks(ask: Ask) -> dict[str, asyncio.Task[None]]:
    found: dict[str, asyncio.Task[None]] = ask.console.kept.setdefault("runs", {})
    return found


def _can_run(ask: Ask, run: Progress) -> bool:
    app, tasks = ask.backend.app, _tasks(ask)
    is_due = run.mode in _MODES and run.state in (ReplayState.PLANNED, ReplayState.RUNNING)
    return (
        is_due
        and app is not None
        and run.consumer in app.consumers
        and str(run.run_id) not in tasks
        and len(tasks) < _AT_ONCE
    )


def _begin(ask: Ask, run: Progress) -> bool:
    """Run it in the background; False where that cannot be."""
    if not _can_run(ask, run):
        return False
    tasks, name = _tasks(ask), str(run.run_id)
    tasks[name] = ask.console.spawn(_run(ask, run), f"replay {name}")
    tasks[name].add_done_callback(lambda _: tasks.pop(name, None))
    return True


async def _run(ask: Ask, run: Progress) -> None:
    """The state, and the error where it fails, are in the run itself."""
    try:
        async with ask.backend.engine(run.consumer) as engine, aclosing(engine.run(run.run_id)) as steps:
            async for _ in steps:
                pass
    except SomaError as error:
        log.warning("Replay %s: %s", run.run_id, error)
    except Exception:
        log.exception("Replay %s failed", run.run_id)


def _wanted(ask: Ask) -> ReplayFilter:
    return ReplayFilter(
        tenant_id=ask.tenant, since=ask.moment("since"), until=ask.moment("until"), **{n: ask.word(n) for n in FIELDS}
    )  # fmt: skip


def _known(consumer: str, names: list[str]) -> str:
    if consumer not in names:
        raise ValidationError(f"No consumer is called {consumer!r:.80}.", cure="choose one of the list.")
    return consumer


def _mode(text: str | None) -> ReplayMode:
    try:
        found = ReplayMode(text or ReplayMode.MISSING)
    except ValueError as error:
        raise ValidationError(f"{text!r:.40} is no mode.", cure="use missing or force.") from error
    if found not in _MODES:
        raise ValidationError("Tables are not rebuilt from here.", cure="use `somastack events replay --mode rebuild`.")
    return found


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/replays", "GET", listed),
    ("/replays", "POST", start),
    ("/replays/new", "GET", plan),
    ("/replays/{run}", "GET", show),
    ("/replays/{run}/{verb}", "POST", act),
    ("/live/replays/{run}", "GET", watch),
)
