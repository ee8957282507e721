"""aiokafka's calls with an end: some of them wait without a bound, or end in a cancellation that is not ours."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
_GRACE = 1.0  # seconds for a cancelled call to end


async def bounded(call: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """The result of a call.

    In a task of its own, so that a CancelledError that leaks out of the client (its ``stop`` does so while the broker
    is away) does not look like the cancellation of the caller.

    Raises:
        TimeoutError: it did not end in time, or was cancelled from within.
    """
    task = asyncio.create_task(call)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        await asyncio.wait({task}, timeout=_GRACE)
    if not task.done() or task.cancelled():
        raise TimeoutError(f"{getattr(call, '__qualname__', 'a call')} did not end within {seconds:.0f} s")
    return task.result()
