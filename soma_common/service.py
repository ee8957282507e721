"""A long-running part: starts once, stops gracefully, tells its health."""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Self

from soma_common.errors import ServiceEnded
from soma_common.garbage import calm_collector
from soma_common.tasks import end
from soma_common.tracing.tracer import outside

_ENDS: Final = (signal.SIGTERM, signal.SIGINT)
_SAME: Final = 1.0  # seconds in which timeout(1), a shell or a supervisor may send one signal twice


class Service(ABC):
    """A loop that runs until it is asked to stop.

    ``start`` and ``stop`` may be called twice. ``stop`` asks the loop to drain and waits at most ``patience`` seconds
    before it cancels it. An error that ends the loop is raised by ``wait`` and by ``stop``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    async def run(self) -> None:
        """The work; returns soon after ``stopping`` is set, with everything drained."""

    async def start(self) -> None:
        """Begin the work in a task of its own, which works in no trace and for no tenant of whoever starts it."""
        if self._task is None:
            self.stopping.clear()
            self._task = asyncio.create_task(self.run(), name=self.name, context=outside())

    async def stop(self, patience: float = 30.0) -> None:
        """Drain and end."""
        self.stopping.set()
        task, self._task = self._task, None
        if task is None:
            return
        done, _ = await asyncio.wait({task}, timeout=patience)
        if not done:
            await end(task)
        elif task.cancelled():  # nobody asked for that: a foreign library's cancellation ended the loop
            raise ServiceEnded(f"{self.name} was cancelled from within.")
        else:
            task.result()

    async def wait(self) -> None:
        """Until the loop ends by itself; raises what ended it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def pause(self, seconds: float) -> bool:
        """Sleep, but wake at once when asked to stop; whether to stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        return self.stopping.is_set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def run_until_signalled(*services: Service, patience: float = 30.0) -> None:
    """Run services until SIGTERM or SIGINT, or until one ends; then stop all, the last started first.

    Another signal, a second or more after the first, ends the process at once; one that comes sooner is the same one,
    sent to the process and to its group. The process is theirs meanwhile: the garbage collector is calmed.

    Raises what ended a service.
    """
    with calm_collector(), _asked_to_end() as asked:
        await _run_until(asked, services, patience)


@contextmanager
def _asked_to_end() -> Iterator[asyncio.Event]:
    """Set by the first SIGTERM or SIGINT."""
    loop, asked, first = asyncio.get_running_loop(), asyncio.Event(), 0.0

    def heard(number: signal.Signals) -> None:
        nonlocal first
        if not asked.is_set():
            first = loop.time()
            asked.set()
        elif loop.time() - first >= _SAME:
            loop.remove_signal_handler(number)
            signal.raise_signal(number)

    for number in _ENDS:
        loop.add_signal_handler(number, heard, number)
    try:
        yield asked
    finally:
        for number in _ENDS:
            loop.remove_signal_handler(number)


async def _run_until(asked: asyncio.Event, services: Sequence[Service], patience: float) -> None:
    waits: set[asyncio.Task[object]] = {asyncio.create_task(asked.wait())}
    try:
        for service in services:
            await service.start()
        waits |= {asyncio.create_task(service.wait()) for service in services}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        results = await asyncio.gather(
            *(service.stop(patience) for service in reversed(services)), return_exceptions=True
        )
        await asyncio.gather(*waits, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise failures[0]
