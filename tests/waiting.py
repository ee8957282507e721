"""Waiting for a condition, with a bound: tests never sleep until something is probably so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from soma_common.testing import eventually, sync_eventually


async def until(condition: Callable[[], Any], *, within: float = 60.0, what: str = "it") -> Any:
    """``eventually`` with the patience that a machine with more to do needs."""
    return await eventually(condition, within=within, what=what)


def wait_until(condition: Callable[[], Any], *, within: float = 60.0, what: str = "it") -> None:
    """``until`` for tests without an event loop."""
    sync_eventually(condition, within=within, what=what)
