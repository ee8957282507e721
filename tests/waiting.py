"""Waiting for a condition, with a bound: tests never sleep until something is probably so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def until(condition: Callable[[], Any], *, within: float = 60.0, what: str = "it") -> Any:
    """Wait until a condition (plain or async) holds; its value. AssertionError when it does not in time.

    The bound is no measure of speed: it is there to end a test that would hang, on a machine with more to do.
    """
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {within:g} s"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], Any], *, within: float = 60.0, what: str = "it") -> None:
    """``until`` for tests without an event loop."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {within:g} s"
        time.sleep(0.02)
