"""The sagas that a worker has under way, each in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from soma_common.sagas.driver import Driver
from soma_common.sagas.models import Saga


class Fleet:
    """Tasks with their drivers.

    Args:
        ended: is called when a task has ended, with what it raised.
    """

    def __init__(self, ended: Callable[[BaseException | None], None]) -> None:
        self._running: dict[asyncio.Task[None], Driver | None] = {}
        self._left: set[asyncio.Task[None]] = set()
        self._ended = ended

    def __len__(self) -> int:
        return len(self._running)

    @property
    def drivers(self) -> list[Driver]:
        """Those that have begun."""
        return [driver for driver in self._running.values() if driver is not None]

    def pairs(self) -> Iterator[tuple[asyncio.Task[None], Driver]]:
        """Those that have begun, with their tasks."""
        return iter([(task, driver) for task, driver in self._running.items() if driver is not None])

    def count_of(self, saga: Saga) -> int:
        """How many of a definition are under way."""
        return sum(driver.saga is saga for driver in self.drivers)

    def start(self, driving: Coroutine[Any, Any, None]) -> None:
        """Begin a task."""
        task = asyncio.create_task(driving)
        self._running[task] = None
        task.add_done_callback(self._gone)

    def begins(self, driver: Driver) -> None:
        """The task that calls has this driver from now on."""
        task = asyncio.current_task()
        if task in self._running:
            self._running[task] = driver

    def leave(self, task: asyncio.Task[None]) -> None:
        """It does not end: it counts no more."""
        self._running.pop(task, None)
        self._left.add(task)
        task.cancel()

    async def wait(self, timeout: float | None = None) -> bool:
        """Until all have ended, or so many seconds have passed; whether they have."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)
        return not self._running

    async def end(self) -> None:
        """Cancel all."""
        for task in (*self._running, *self._left):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._left.discard(task)
        self._ended(None if task.cancelled() else task.exception())
