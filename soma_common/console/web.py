"""The console as an application: its pages, and what each request has at hand."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from soma_common import errors
from soma_common.console.backend import Backend
from soma_common.console.people import Gate, Person, Role, Signer
from soma_common.console.rendering import query, render
from soma_common.console.security import Guard, Refused, Visit
from soma_common.console.settings import ConsoleSettings
from soma_common.errors import SomaError, ValidationError
from soma_common.events.store import ALL_TENANTS, AllTenants
from soma_common.postgres.errors import sqlstate_of

log = logging.getLogger(__name__)
audit = logging.getLogger("soma_common.console.audit")

_STATUS: Final[tuple[tuple[type[SomaError], int], ...]] = (
    (errors.LetterNotFound, 404), (errors.SagaNotFound, 404), (errors.ValidationError, 400),
    (errors.ReplayRefused, 409), (errors.WrongSagaState, 409), (errors.LetterChanged, 409),
    (errors.TransactionConflict, 409), (errors.InfrastructureError, 503), (errors.ConfigurationError, 503),
    (errors.MigrationError, 503),
)  # fmt: skip
_CANCELLED: Final = "57014"
_PATIENCE: Final = 4  # a page may take so many times as long as one of its statements
_TIMES: Final = re.compile(r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:?\d{2})?)?$")
_MOST_REASON: Final = 500

Page = Callable[["Ask"], Awaitable[Response]]


class Console:
    """What all requests share."""

    def __init__(self, settings: ConsoleSettings, backend: Backend) -> None:
        self.settings, self.backend = settings, backend
        self.signer = Signer()
        self.gate = Gate(settings, self.signer)
        self.closing = asyncio.Event()
        self.live = 0  # connections of browsers that are told what changes
        self.tasks: set[asyncio.Task[Any]] = set()
        self.kept: dict[str, Any] = {}  # what rooms keep between requests

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Begin work in the background; it ends with the console."""
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def note(self, what: str, person: Person, **facts: Any) -> None:
        """A line in the log about what somebody did."""
        told = " ".join(f"{name}={value!r:.300}" for name, value in facts.items())
        audit.info("%s by %r: %s", what, person.who, told)

    async def close(self) -> None:
        """End what runs in the background; live connections end by themselves."""
        self.closing.set()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@dataclass(slots=True)
class Ask:
    """One request of somebody who may make it."""

    console: Console
    request: Request
    visit: Visit
    person: Person

    @property
    def backend(self) -> Backend:
        """Database and library."""
        return self.console.backend

    @property
    def form(self) -> Mapping[str, str]:
        """The fields of the form that came."""
        return self.visit.form

    def word(self, name: str) -> str | None:
        """What is asked for by a name; None where nothing is."""
        return (self.request.query_params.get(name) or "").strip() or None

    def words(self, name: str) -> list[str]:
        """The same, where several may be."""
        return [each for each in self.request.query_params.getlist(name) if each]

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def moment(self, name: str) -> datetime | None:
        """A moment that is asked for; in UTC, unless it has an offset."""
        text = self.word(name)
        if text is None:
            return None
        try:
            if not _TIMES.fullmatch(text):
                raise ValueError
            found = datetime.fromisoformat(text)
        except ValueError as error:
            raise ValidationError(f"{name} {text!r:.60} is no time.", cure="write 2026-11-30T18:00, in UTC.") from error
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    def number(self, name: str, default: int | None = None) -> int | None:
        """A whole number that is asked for."""
        text = self.word(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ValidationError(f"{name} {text!r:.60} is no number.", cure="use digits.")
        return int(text)

    @property
    def tenant(self) -> str | AllTenants:
        """Whose things are asked for: one tenant's, or all, where this person may see them."""
        asked, allowed = self.word("tenant"), self.person.tenants
        if allowed is None:
            return ALL_TENANTS if asked is None else asked
        if asked is None and allowed:
            return min(allowed)
        if asked is None or asked not in allowed:
            raise Refused(403, f"You may not see tenant {asked or '-'!s:.80}.", "choose one of yours.")
        return asked

    def must_see(self, tenant: str | None, none: Refused) -> None:
        """That this person may see a thing of this tenant.

        Raises:
            Refused: they may not: ``none``, what is said where there is no such thing.
        """
        if not self.person.may_see(tenant):
            raise none

    def must_see_all(self) -> None:
        """That this person may see what belongs to all tenants together."""
        if self.person.tenants is not None:
            raise Refused(403, "This is about all tenants together.", "ask somebody who may see them all.")

    def reason(self) -> str:
        """Why somebody does something; every verb has a reason."""
        text = self.form.get("reason", "").strip()
        if not 1 <= len(text) <= _MOST_REASON:
            raise ValidationError(f"A reason of {len(text)} characters.", cure=f"say why, in 1 to {_MOST_REASON}.")
        return text

    def did(self, what: str, **facts: Any) -> None:
        """Leave a line about what was done in the log, beside what the database keeps of it."""
        self.console.note(what, self.person, **facts)

    def href(self, path: str, **given: Any) -> str:
        """A link that keeps the tenant that was chosen."""
        return query(path, **({"tenant": self.word("tenant")} | given))

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """A page."""
        return HTMLResponse(self.part(template, **values), status)

    def part(self, template: str, **values: Any) -> str:
        """A page, or a part of one, as text."""
        path = self.request.url.path
        return render(template, {
            "person": self.person, "csrf": self.visit.csrf, "theme": self.visit.theme, "href": self.href, "path": path,
            "here": path + (f"?{self.request.url.query}" if self.request.url.query else ""), "now": datetime.now(UTC),
            "chosen": self.word("tenant") or "", "tenants": sorted(self.person.tenants or ()),
            "signed_in": self.person.way == "token", "said": self.said, "args": self.request.query_params,
        } | values)  # fmt: skip

    def back(self, path: str, said: str = "", **given: Any) -> Response:
        """To another page after a form, which says what was done; nobody else can make it say something."""
        told = self.console.signer.sign("said", said) if said else None
        return RedirectResponse(self.href(path, said=told, **given), 303)

    @property
    def said(self) -> str:
        """What a form before this page did."""
        text = self.console.signer.read("said", self.word("said")) if self.console else None
        return text if isinstance(text, str) else ""


def application(console: Console, rooms: Iterable[Iterable[tuple[str, str, Page]]]) -> Guard:
    """The console with its rooms: each has paths, the method, and what makes the page."""
    routes: list[BaseRoute] = [
        Route("/healthz", lambda request: PlainTextResponse("ok\n"), methods=["GET"]),
        Mount("/static", StaticFiles(packages=[("soma_common.console", "static")]), name="static"),
    ]
    for room in rooms:
        routes += [Route(path, _endpoint(console, page), methods=[method]) for path, method, page in room]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _missing, Exception: _failed})
    return Guard(app, console.settings, console.gate, console.signer, refusal)


def _endpoint(console: Console, page: Page) -> Callable[[Request], Awaitable[Response]]:
    limit = console.settings.query_timeout * _PATIENCE

    async def answer(request: Request) -> Response:
        visit: Visit = request.scope["state"]["visit"]
        ask = Ask(console, request, visit, visit.person or NOBODY)
        try:
            async with asyncio.timeout(limit):
                return await page(ask)
        except Refused as error:
            return refusal(request, error)
        except SomaError as error:
            return refusal(request, Refused(_status_of(error), error.message, error.cure or ""))
        except TimeoutError:
            return refusal(request, _SLOW)
        except Exception as error:
            if sqlstate_of(error) == _CANCELLED:
                return refusal(request, _SLOW)
            return _unknown(request, error)

    return answer


NOBODY: Final = Person("nobody", Role.VIEWER, frozenset(), "nobody")
_SLOW: Final = Refused(
    504, "The database took too long for this page.", "narrow what you look for: a tenant, a type, a time, a status."
)


def refusal(request: Request, error: Refused) -> Response:
    """The page of something that is not answered, or went wrong: what, and what helps."""
    visit: Visit = request.scope.setdefault("state", {}).get("visit") or Visit(None, "", "", False)
    if "text/html" not in request.headers.get("accept", "text/html"):
        return PlainTextResponse(f"{error.message}\n{error.cure}\n", error.status)
    ask = Ask(_NO_CONSOLE, request, visit, visit.person or NOBODY)
    return ask.page("error.html", status=error.status, error=error, known=visit.person is not None)


_NO_CONSOLE: Any = None


def _status_of(error: SomaError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 400)


def _unknown(request: Request, error: Exception) -> Response:
    number = secrets.token_hex(4)
    log.error("Page %s failed (%s)", request.url.path, number, exc_info=error)
    return refusal(request, Refused(500, f"Something failed in the console ({number}).", "its log tells more."))


async def _missing(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        return refusal(request, Refused(405, "This page is not asked for that way.", "follow a link or a form."))
    return refusal(request, Refused(404, "There is no such page.", "begin at the overview."))


async def _failed(request: Request, error: Exception) -> Response:
    return _unknown(request, error)
