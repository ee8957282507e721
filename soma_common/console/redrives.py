"""Another try of many letters: counted first, then asked for in the background, with its progress to be seen."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from starlette.responses import Response

from soma_common.console.letters import BOUND, asked, wanted
from soma_common.console.live import Parts, live
from soma_common.console.security import Refused
from soma_common.console.web import Ask, Page
from soma_common.dlq.careful import Redrive, RedriveRules
from soma_common.dlq.filters import LetterFilter, where
from soma_common.dlq.verbs import markable
from soma_common.errors import SomaError, ValidationError
from soma_common.events.store import AllTenants
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4
_KEPT: Final = 50
_STOPPED: Final = "It was stopped. What was asked for stays so."


@dataclass(slots=True)
class Job:
    """A re-drive that this console began."""

    number: str
    who: str
    reason: str
    tenant: str | AllTenants
    filter: dict[str, str]
    total: int
    began: datetime
    state: Redrive = field(default_factory=Redrive)
    ended: datetime | None = None
    trouble: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def outcome(self) -> str:
        """How it stands, in a word."""
        if self.ended is None:
            return "running"
        return "stopped" if self.trouble or self.state.stopped else "done"


def _jobs(ask: Ask) -> dict[str, Job]:
    found: dict[str, Job] = ask.console.kept.setdefault("redrives", {})
    return found


async def count(ask: Ask, given: LetterFilter) -> int:
    """How many letters of a filter another try could be asked for, as far as a bound."""
    sql = blocks("console")
    clause, args = where(markable(given).conditions())
    end = sql["markable_end"].replace("$n", f"${len(args) + 1}")
    rows = await ask.backend.pool.fetch_planned(f"{sql['markable']}\n{clause}{end}", *args, BOUND)
    return int(rows[0][0])


async def plan(ask: Ask) -> Response:
    """A dry run: how many letters would be tried again. Nothing is changed."""
    given = wanted(ask)
    return ask.page("redrive.html", total=await count(ask, given), bound=BOUND, wanted=asked(ask), rules=RedriveRules())


async def start(ask: Ask) -> Response:
    """Begin."""
    reason, given, jobs = ask.reason(), wanted(ask), _jobs(ask)
    rules = RedriveRules(
        rate=number_in(ask, "rate", None), failures=number_in(ask, "failures", 0.5) or 0.5,
        ahead=int(number_in(ask, "ahead", 200) or 200), wait=True,
    )  # fmt: skip
    most = number_in(ask, "most", None)
    if ask.person.tenants is not None and (await ask.backend.fetch("strangers_of_tenant", given.tenant_id))[0][0]:
        raise Refused(403, "Letters of other tenants stand in the same sequences.", "ask somebody who may see them.")
    if sum(job.ended is None for job in jobs.values()) >= _AT_ONCE:
        raise Refused(409, f"{_AT_ONCE} re-drives are running.", "wait for one, or stop it.")
    told = {name: str(value) for name, value in asked(ask).items() if value}
    job = Job(
        secrets.token_hex(6), ask.person.who, reason, ask.tenant, told, await count(ask, given), datetime.now(UTC)
    )
    jobs[job.number] = job
    for old in [each for each in jobs.values() if each.ended][: max(0, len(jobs) - _KEPT)]:
        del jobs[old.number]
    job.task = ask.console.spawn(_run(ask, job, given, rules, None if most is None else int(most)), "re-drive")
    ask.did("re-drive begun", job=job.number, reason=reason, filter=told, total=job.total)
    return ask.back(f"/redrives/{job.number}")


async def _run(ask: Ask, job: Job, given: LetterFilter, rules: RedriveRules, most: int | None) -> None:
    try:
        steps = ask.backend.letters(job.who, slow=True).redrive(given, rules=rules, most=most, why=job.reason)
        async for job.state in steps:
            pass
    except asyncio.CancelledError:
        job.trouble = _STOPPED
        raise
    except SomaError as error:
        job.trouble = error.message
    except Exception as error:
        log.exception("Re-drive %s failed", job.number)
        job.trouble = f"It failed: {type(error).__name__}. The log of the console tells more."
    finally:
        job.ended = datetime.now(UTC)


async def show(ask: Ask) -> Response:
    """How a re-drive stands."""
    return ask.page("redrive_job.html", job=_job(ask), bound=BOUND)


async def stop(ask: Ask) -> Response:
    """Ask for no more letters."""
    reason, job = ask.reason(), _job(ask)
    if job.task is not None and job.ended is None:
        job.task.cancel()
        await asyncio.wait({job.task}, timeout=2)
    if job.ended is None:  # it had not begun
        job.ended, job.trouble = datetime.now(UTC), _STOPPED
    ask.did("re-drive stopped", job=job.number, reason=reason)
    return ask.back(f"/redrives/{job.number}", _STOPPED)


async def listed(ask: Ask) -> Response:
    """Re-drives of this console since it began."""
    mine = [job for job in _jobs(ask).values() if _is_mine(ask, job)]
    return ask.page("redrives.html", jobs=sorted(mine, key=lambda job: job.began, reverse=True), bound=BOUND)


async def watch(ask: Ask) -> Response:
    """The same, while it goes on."""
    job = _job(ask)

    async def look() -> Parts:
        return {"job": ask.part("redrive_part.html", job=job, bound=BOUND)}

    return live(ask, look, every=0.5, until=lambda: job.ended is not None)


def _job(ask: Ask) -> Job:
    job = _jobs(ask).get(ask.path("job"))
    if job is None or not _is_mine(ask, job):
        raise Refused(404, "There is no such re-drive.", "this console began none since it was started.")
    return job


def _is_mine(ask: Ask, job: Job) -> bool:
    return ask.person.tenants is None or job.tenant in ask.person.tenants


def number_in(ask: Ask, name: str, default: float | None) -> float | None:
    """A number of a form, above 0."""
    text = ask.form.get(name, "").strip()
    if not text:
        return default
    try:
        found = float(text)
    except ValueError as error:
        raise ValidationError(f"{name} {text!r:.40} is no number.", cure="use digits.") from error
    if not 0 < found <= 1e9:
        raise ValidationError(f"{name} {text!r:.40} cannot be.", cure="use a number above 0.")
    return found


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/redrive", "GET", plan),
    ("/redrive", "POST", start),
    ("/redrives", "GET", listed),
    ("/redrives/{job}", "GET", show),
    ("/redrives/{job}/stop", "POST", stop),
    ("/live/redrives/{job}", "GET", watch),
)
