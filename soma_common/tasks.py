"""Ending a task, without missing that oneself is to end."""

from __future__ import annotations

import asyncio
from typing import Any


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; raises what it raised, but for its cancellation.

    Whoever is cancelled while it waits is cancelled: ``suppress(CancelledError)`` around ``await task`` would take that
    for the task's end, and go on.
    """
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
