"""Waiting for a condition, with a bound: what happens in other tasks and processes takes a time that nobody knows."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

WITHIN: Final = 30.0
"""Seconds. No measure of speed: the bound ends a test that would hang, also on a machine that is busy."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25


async def eventually(
    condition: Callable[[], T | Awaitable[T]], *, within: float = WITHIN, what: str | None = None
) -> T:
    """Wait until a condition holds; the value that it returned.

    It holds when it returns something true. It may as well assert: an AssertionError is tried again, any other
    exception ends the wait at once.

    Args:
        condition: a plain or an async function without arguments.
        within: the most seconds to wait. An async condition is cut off when they are over.
        what: names it in the error; by default the function's own name.

    Raises:
        AssertionError: it did not hold in time; tells what it came to last.
    """
    last = _Last(condition, within, what)
    try:
        async with asyncio.timeout(within) as scope:
            for pause in _pauses():
                with last:
                    value = condition()
                    if inspect.isawaitable(value):
                        value = await value
                    if last.saw(value):
                        return value
                await asyncio.sleep(pause)
    except TimeoutError:
        if not scope.expired():  # its own
            raise
    raise last.failure()


def sync_eventually(condition: Callable[[], T], *, within: float = WITHIN, what: str | None = None) -> T:
    """:func:`eventually` for tests without an event loop; the condition is a plain function."""
    last, end = _Last(condition, within, what), time.monotonic() + within
    for pause in _pauses():
        with last:
            value = condition()
            if inspect.iscoroutine(value):
                value.close()
                raise TypeError("The condition is async: use `await eventually(...)`.")
            if last.saw(value):
                return value
        if time.monotonic() >= end:
            break
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
    raise last.failure()


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(_LONGEST_PAUSE, pause * 1.5)


class _Last:
    """What a condition came to last. As a context: an AssertionError inside is kept, and not raised."""

    def __init__(self, condition: Callable[[], Any], within: float, what: str | None) -> None:
        if not callable(condition):
            raise TypeError(f"{condition!r:.100} is no function: pass `lambda: ...`, or the function itself.")
        if not within > 0:
            raise ValueError(f"within is {within!r}: give seconds, more than 0.")
        self._what = what or getattr(condition, "__name__", "the condition")
        self._within = within
        self._value: Any = None
        self._error: BaseException | None = None

    def saw(self, value: Any) -> bool:
        self._value, self._error = value, None
        return bool(value)

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, AssertionError):
            return False
        self._error = error
        return True

    def failure(self) -> AssertionError:
        came_to = f"it was {self._value!r:.500}" if self._error is None else str(self._error) or "its assertion failed"
        failure = AssertionError(f"{self._what} did not hold within {self._within:g} s: {came_to}")
        failure.__cause__ = self._error
        return failure
