"""Coming and going: the sign-in page, the end of a session, and the choice of colours."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.responses import RedirectResponse, Response

from soma_common.console.security import SESSION, THEME, cookie, local_path
from soma_common.console.web import Ask, Page

_WRONG: Final = 0.5  # seconds that a wrong token waits
_YEAR: Final = 365 * 86_400


async def sign_in(ask: Ask) -> Response:
    """The page that asks for a token."""
    if ask.person.way not in ("nobody", "token") or not ask.console.gate.takes_tokens:
        return RedirectResponse("/", 303)
    # Who comes by a link from elsewhere did not bring the session; the next request from here does.
    strange = ask.request.headers.get("sec-fetch-site") == "cross-site"
    return ask.page("sign_in.html", to=local_path(ask.word("next") or "/"), wrong=False, name="", strange=strange)


async def signed_in(ask: Ask) -> Response:
    """Whether the token is one; then a session begins."""
    name, to = ask.form.get("name", ""), local_path(ask.form.get("next", "/"))
    person = ask.console.gate.of_token(ask.form.get("token", "").strip(), name) if name.strip() else None
    if person is None:
        await asyncio.sleep(_WRONG)
        return ask.page("sign_in.html", status=403, to=to, wrong=True, name=name, strange=False)
    answer = RedirectResponse(to, 303)
    age = int(ask.console.settings.session_hours * 3600)
    session = ask.console.gate.session_of(person)
    answer.headers.append("set-cookie", cookie(SESSION, session, secure=ask.visit.secure, age=age))
    ask.console.note("signed in", person, role=person.role.value)
    return answer


async def sign_out(ask: Ask) -> Response:
    """The end of a session."""
    answer = RedirectResponse("/sign-in", 303)
    answer.headers.append("set-cookie", cookie(SESSION, "", secure=ask.visit.secure, age=0))
    return answer


async def theme(ask: Ask) -> Response:
    """Light, dark, or as the system has it."""
    chosen = ask.form.get("theme", "")
    answer = RedirectResponse(local_path(ask.form.get("back", "/")), 303)
    kept = chosen if chosen in ("light", "dark") else ""
    answer.headers.append(
        "set-cookie", cookie(THEME, kept, secure=ask.visit.secure, age=_YEAR if kept else 0, strict=False)
    )
    return answer


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (
    ("/sign-in", "GET", sign_in),
    ("/sign-in", "POST", signed_in),
    ("/sign-out", "POST", sign_out),
    ("/theme", "POST", theme),
)
