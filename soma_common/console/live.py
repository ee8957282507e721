"""What changes while somebody looks: parts of pages over server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

import orjson
from starlette.responses import StreamingResponse

from soma_common.console.security import Refused
from soma_common.console.web import Ask
from soma_common.errors import SomaError
from soma_common.postgres.errors import is_from_driver

_LONGEST: Final = 300.0  # seconds; then the browser connects again, and is asked anew who it is
_BEAT: Final = 15.0  # seconds without news after which a sign of life is sent
_WAIT: Final = 3000  # milliseconds after which a browser connects again

Parts = dict[str, str]
"""Parts of a page by the ids of their elements."""


def live(
    ask: Ask, look: Callable[[], Awaitable[Parts]], *, every: float, until: Callable[[], bool] | None = None
) -> StreamingResponse:
    """Parts of a page as they change, looked at every so many seconds. ``until``: nothing more will change.

    Raises:
        Refused: too many browsers look.
    """
    console = ask.console
    if console.live >= console.settings.live:
        raise Refused(503, "Too many browsers are watching.", "close some, or load the page by hand.")
    return StreamingResponse(
        _told(ask, look, every, until), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )  # fmt: skip


async def _told(
    ask: Ask, look: Callable[[], Awaitable[Parts]], every: float, until: Callable[[], bool] | None
) -> AsyncIterator[bytes]:
    console, known, end = ask.console, dict[str, str](), time.monotonic() + _LONGEST
    beat = time.monotonic() + _BEAT
    console.live += 1
    try:
        yield f"retry: {_WAIT}\n\n".encode()
        while not console.closing.is_set() and time.monotonic() < end:
            over = until is not None and until()
            try:
                async with asyncio.timeout(console.settings.query_timeout):
                    parts = await look()
            except Exception as error:
                if not isinstance(error, SomaError | TimeoutError) and not is_from_driver(error):
                    raise
                yield _event("trouble", {"text": "The database does not answer: what you see is not fresh."})
                parts = {}
            changed = {name: html for name, html in parts.items() if known.get(name) != html}
            known |= changed
            if changed:
                yield _event("parts", changed)
            elif time.monotonic() > beat:
                beat = time.monotonic() + _BEAT
                yield b": here\n\n"
            if over:
                yield _event("over", {})
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await console.closing.wait()
    finally:
        console.live -= 1


def _event(name: str, value: Parts) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(value))
