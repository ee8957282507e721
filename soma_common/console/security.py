"""What stands before every page: names, headers, who asks, forms that are really ours, and bounds."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from soma_common.console.people import Gate, Person, Signer
from soma_common.console.settings import ConsoleSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_FORM: Final = 8 * 1024 * 1024  # bytes
_MOST_FIELDS: Final = 200
_WRONG: Final = 0.5  # seconds that a wrong token waits
_OPEN: Final = ("/sign-in", "/theme")  # forms of people who are nobody yet
_VISIT, SESSION, THEME = "soma_visit", "soma_session", "soma_theme"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "x-frame-options": "DENY",
    "referrer-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin", "permissions-policy": "camera=(), geolocation=(), microphone=()",
}  # fmt: skip


class Refused(Exception):
    """A request that is not answered. ``status`` and what a person is told."""

    def __init__(self, status: int, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.cure = status, message, cure


@dataclass(slots=True)
class Visit:
    """A request as the guard saw it: who asks, and the form that came."""

    person: Person | None
    csrf: str
    theme: str
    secure: bool
    form: dict[str, str] = field(default_factory=dict)


class Guard:
    """An ASGI application around the pages. ``refused`` makes the page of a request that is refused."""

    def __init__(
        self, app: Any, settings: ConsoleSettings, gate: Gate, signer: Signer,
        refused: Callable[[Request, Refused], Response],
    ) -> None:  # fmt: skip
        self._app, self._settings, self._gate, self._signer, self._refused = app, settings, gate, signer, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        cookies: list[str] = []
        answer: Any
        try:
            answer = await self._checked(request, cookies)
        except Refused as error:
            scope.setdefault("state", {}).setdefault("visit", Visit(None, "", "", False))
            answer = self._refused(request, error)
        await (answer or self._app)(scope, receive, _stamped(send, scope, cookies))

    async def _checked(self, request: Request, cookies: list[str]) -> Response | None:
        """None: the pages answer."""
        headers = request.headers
        self._check_host(headers)
        path = request.url.path
        if path.startswith("/static/") or path == "/healthz":
            return None
        if request.method not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"{request.method:.20} is no way to ask here.")
        peer = request.client.host if request.client else None
        secure = request.url.scheme == "https" or (
            self._gate.is_proxy(peer) and headers.get("x-forwarded-proto", "") == "https"
        )
        visit_id = self._visit(request, cookies, secure)
        person = self._gate.person(peer, headers, request.cookies.get(SESSION))
        theme = request.cookies.get(THEME, "")
        visit = Visit(
            person, self._signer.mac("csrf", visit_id), theme if theme in ("light", "dark") else "", secure
        )  # fmt: skip
        request.scope.setdefault("state", {})["visit"] = visit
        # Bearer only: what a browser knows for Basic it adds by itself, also to forms of other sites.
        by_header = headers.get("authorization", "").lower().startswith("bearer ")
        if person is None and by_header:
            await asyncio.sleep(_WRONG)
        if request.method == "POST":
            await self._check_form(request, visit, by_header=by_header)
        if person is None and path not in _OPEN:
            return self._who(request, by_header)
        if request.method == "POST" and path not in (*_OPEN, "/sign-out") and not (person and person.acts):
            raise Refused(403, "You may look here, and not act.", "ask for the role operator.")
        return None

    def _check_host(self, headers: Headers) -> None:
        """A page of somebody else whose name leads to our address must not be taken for one of ours."""
        names = self._settings.names
        name = host_of(headers.get("host", ""))
        if len(headers.getlist("host")) != 1 or (names is not None and name not in names):
            raise Refused(421, f"The console is not known as {name:.100}.", "name it in SOMA_CONSOLE_HOSTS.")

    def _visit(self, request: Request, cookies: list[str], secure: bool) -> str:
        """What a browser is known by; forms are bound to it."""
        known = self._signer.read("visit", request.cookies.get(_VISIT))
        if isinstance(known, str):
            return known
        fresh = secrets.token_urlsafe(18)
        # Lax: who comes by a link from elsewhere is the same visitor, and forms that are open stay good.
        cookies.append(cookie(_VISIT, self._signer.sign("visit", fresh), secure=secure, strict=False))
        return fresh

    async def _check_form(self, request: Request, visit: Visit, *, by_header: bool) -> None:
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        host = request.headers.get("host", "")
        if (origin is not None and urlsplit(origin).netloc != host) or site not in ("same-origin", "none"):
            raise Refused(403, "This form comes from another site.", "open the page here, and send it again.")
        if origin is None and not by_header:
            raise Refused(
                403, "This form does not say where it comes from.", "send it with a browser, or with a token."
            )
        visit.form = await _form(request)
        token = visit.form.pop("csrf", "")
        if by_header and visit.person is not None:  # no browser adds this header by itself
            return
        if not hmac.compare_digest(token.encode("utf-8", "replace"), visit.csrf.encode()):
            raise Refused(403, "This form is not from here, or too old.", "go back, load the page anew, send it again.")

    def _who(self, request: Request, by_header: bool) -> Response:
        if not self._gate.takes_tokens or by_header:
            raise Refused(401, "Nobody knows who you are.", "come with a token, or through the proxy.")
        if request.method != "GET" or request.url.path.startswith("/live/"):
            raise Refused(401, "Your session is over.", "sign in again.")
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/sign-in?next={quote(here, safe='')}", 303)


def cookie(name: str, value: str, *, secure: bool, age: int | None = None, strict: bool = True) -> str:
    """A cookie that scripts cannot read, nor other sites send. Not ``strict``: by links that lead here they may."""
    until = "" if age is None else f"; Max-Age={age}"
    site = "Strict" if strict else "Lax"
    return f"{name}={value}; Path=/; HttpOnly; SameSite={site}{until}{'; Secure' if secure else ''}"


def local_path(text: str) -> str:
    """A path of this console, for going back there; else the overview."""
    parts = urlsplit(text)
    fits = text.startswith("/") and not text.startswith("//") and "\\" not in text and text.isprintable()
    return text if fits and not parts.netloc and not parts.scheme else "/"


def host_of(header: str) -> str:
    """The name in a Host header."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()


async def _form(request: Request) -> dict[str, str]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise Refused(415, "This is no form.", "send application/x-www-form-urlencoded.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_FORM:
            raise Refused(413, f"This form has more than {MOST_FORM:,} bytes.", "edit large values by `somastack dlq`.")
    try:
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict"
        )  # fmt: skip
    except ValueError as error:
        raise Refused(400, "This form cannot be read.", "it must be UTF-8, with few fields.") from error
    return dict(fields)


def _stamped(send: Send, scope: Scope, cookies: list[str]) -> Send:
    """Every answer carries the headers that keep browsers careful."""

    async def stamp(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if scope["path"].startswith("/static/"):
                headers["cache-control"] = "public, max-age=3600"
            else:
                headers["cache-control"] = "no-store"
                for each in cookies:
                    headers.append("set-cookie", each)
            message = {**message, "headers": headers.raw}
        await send(message)

    return stamp


def plain_refusal(error: Refused) -> Response:
    """A refusal where no page can be made."""
    return PlainTextResponse(f"{error.message}\n{error.cure}\n", error.status)
