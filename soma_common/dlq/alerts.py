"""Tells an application of its new dead letters, without ever keeping a consumer waiting."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from soma_common.dlq.models import LetterNotice
from soma_common.errors import SomaError
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

Hook = Callable[[LetterNotice], Any]

_MOST: Final = 1000  # notices that may wait
_AWAY: Final = Backoff(base=0.2, maximum=5.0)


class Alerts:
    """Calls a hook for each letter, one call after the other, in a task of its own.

    A coroutine function is awaited, anything else runs in a thread. A call that fails, takes longer than ``timeout``
    seconds or finds no room among those that wait is logged and counted as lost; the consumer goes on in any case.
    """

    def __init__(self, hook: Hook | None, pool: Pool, *, timeout: float = 10.0, most: int = _MOST) -> None:
        self._hook, self._pool, self._timeout = hook, pool, timeout
        self._waiting: asyncio.Queue[tuple[LetterNotice, bool]] = asyncio.Queue(most)
        self._hung: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self.told = self.lost = 0

    def tell(self, notice: LetterNotice, *, doubtful: bool = False) -> None:
        """A letter was written; ``doubtful``: or not, its commit was not answered. Returns at once."""
        if self._hook is None:
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"alerts of {notice.consumer}")
        try:
            self._waiting.put_nowait((notice, doubtful))
        except asyncio.QueueFull:
            self._lost(notice, "too many alerts wait")

    async def stop(self, patience: float = 5.0) -> None:
        """Let the waiting ones be told, for so many seconds at most."""
        task, self._task = self._task, None
        if task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._waiting.join()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while not self._waiting.empty():
            self._lost(self._waiting.get_nowait()[0], "the consumer stops")

    async def _run(self) -> None:
        while True:
            notice, doubtful = await self._waiting.get()
            try:
                if not doubtful or await self._exists(notice):
                    await self._call(notice)
            except asyncio.CancelledError:
                self._lost(notice, "the consumer stops")
                raise
            finally:
                self._waiting.task_done()

    async def _exists(self, notice: LetterNotice) -> bool:
        """Whether the letter is there after all; waits for the database."""
        record = notice.record
        place = (notice.consumer, record.topic, record.partition, record.offset, record.digest)
        for delay in _AWAY.delays():
            try:
                return bool(await self._pool.fetch(blocks("dead_letters")["exists"], *place))
            except SomaError as error:
                log.debug("Whether a letter was written is not known yet: %s", error)
            await asyncio.sleep(delay)
        return False

    async def _call(self, notice: LetterNotice) -> None:
        assert self._hook is not None
        try:
            if _is_async(self._hook):
                await self._bounded(self._hook(notice))
            else:
                result = await self._bounded(self._in_thread(notice))
                if inspect.isawaitable(result):
                    await self._bounded(result)
            self.told += 1
        except TimeoutError as error:
            self._lost(notice, str(error) or "it took too long")
        except Exception as error:
            self._lost(notice, f"{type(error).__name__}: {error}")

    async def _bounded(self, call: Awaitable[Any]) -> Any:
        """The result in time; a call that does not let itself be cancelled is left behind."""
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task}, timeout=self._timeout)
        finally:
            if not task.done():
                task.cancel()
        if not task.done() or task.cancelled():
            raise TimeoutError(f"it did not end within {self._timeout:g} s")
        return task.result()

    def _in_thread(self, notice: LetterNotice) -> asyncio.Future[Any]:
        """In a thread that does not keep the process from ending; while one hangs no other is started."""
        if self._hung is not None and self._hung.is_alive():
            raise TimeoutError("an earlier call still hangs")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not done.done():
                done.set_result(result) if error is None else done.set_exception(error)

        def work() -> None:
            result, failed = None, None
            try:
                result = self._hook(notice) if self._hook is not None else None
            except Exception as error:
                failed = error
            except BaseException as error:  # SystemExit in a thread would end the thread only, and tell nobody
                failed = RuntimeError(f"the hook raised {type(error).__name__}")
            with suppress(RuntimeError):  # the loop may be gone
                loop.call_soon_threadsafe(settle, result, failed)

        self._hung = threading.Thread(target=work, name="soma dead-letter hook", daemon=True)
        self._hung.start()
        return done

    def _lost(self, notice: LetterNotice, why: str) -> None:
        self.lost += 1
        log.error("on_dead_letter was not told of a letter of %s: %s", notice.place, why)


def _is_async(hook: Hook) -> bool:
    call = hook if inspect.isroutine(hook) else getattr(hook, "__call__", hook)  # noqa: B004 - an instance
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(call)
