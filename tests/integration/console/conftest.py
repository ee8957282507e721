"""A furnished shop with its console, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest

from soma_common.app import Soma
from soma_common.console.backend import Backend
from soma_common.console.serving import make_console
from soma_common.console.settings import ConsoleSettings
from soma_common.console.web import Console
from soma_common.dlq.models import Letter
from soma_common.events.store import ALL_TENANTS
from tests.console_shop import furnish, opened

HOME = "http://127.0.0.1:8790"


class Visitor:
    """Somebody with a browser, as far as the server can tell."""

    def __init__(
        self, app: Any, *, peer: str = "127.0.0.1", base: str = HOME, headers: dict[str, str] | None = None
    ) -> None:
        transport = httpx.ASGITransport(app, client=(peer, 50_000))
        given = {"accept": "text/html,*/*"} | (headers or {})
        self.http = httpx.AsyncClient(transport=transport, base_url=base, headers=given)

    async def get(self, path: str, **more: Any) -> httpx.Response:
        """A page."""
        return await self.http.get(path, **more)

    async def page(self, path: str) -> str:
        """A page that must be there, as text."""
        answer = await self.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[-600:]}"
        return answer.text

    async def csrf(self) -> str:
        """The number that its forms carry."""
        text = (await self.get("/sign-in", follow_redirects=True)).text
        return text.partition('name="csrf" value="')[2].partition('"')[0]

    async def send(
        self, path: str, *, csrf: str | None = None, origin: str | None = HOME, **fields: Any
    ) -> httpx.Response:
        """A form, sent as a browser does."""
        token = await self.csrf() if csrf is None else csrf
        headers = {} if origin is None else {"origin": origin}
        return await self.http.post(path, data={"csrf": token} | fields, headers=headers)

    async def done(self, path: str, **fields: Any) -> str:
        """The page after a form that was taken."""
        answer = await self.send(path, **fields)
        assert answer.status_code == 303, f"{path}: {answer.status_code} {answer.text[-600:]}"
        return (await self.http.get(answer.headers["location"])).text


@dataclass
class World:
    """The shop, the console's connections to it, and a person on loopback."""

    shop: Soma
    backend: Backend
    console: Console
    app: Any
    ann: Visitor
    sagas: dict[str, UUID]

    def visitor(self, settings: ConsoleSettings, **given: Any) -> Visitor:
        """Somebody at a console with other settings."""
        return Visitor(make_console(settings, self.backend)[1], **given)

    async def letters(self, **wanted: Any) -> list[Letter]:
        """Letters, the oldest first."""
        page = await self.backend.letters("test").list_dlq_events(**({"tenant_id": ALL_TENANTS} | wanted))
        return list(page.letters)


@pytest.fixture
async def world(soma_database: str) -> AsyncIterator[World]:
    async with opened(soma_database) as (shop, backend):
        sagas = await furnish(shop)
        console, app = make_console(ConsoleSettings(), backend)
        try:
            yield World(shop, backend, console, app, Visitor(app), sagas)
        finally:
            await console.close()
