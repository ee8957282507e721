"""Drives one saga: asks the machine what is next, and does it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Final

from soma_common.sagas.course import Course
from soma_common.sagas.machine import Work
from soma_common.sagas.steps import SagaStep, Signal
from soma_common.sagas.stepping import Parts, Stepper
from soma_common.sagas.waiting import Waiter

_PATIENCE: Final = 1.0  # seconds for which a saga that waits is kept; for longer it is given back


class Driver:
    """One claimed saga, until it has ended or is given back."""

    def __init__(self, parts: Parts, course: Course) -> None:
        self.course = course
        self._recorder = parts.recorder
        self.stepper = Stepper(parts, course)
        self._waiter = Waiter(parts, course, self.stepper)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._nudge = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Begin nothing new; give it back when what is under way has ended."""
        self._stopping = True
        self._nudge.set()

    def nudge(self) -> None:
        """Something has come: look again."""
        self._nudge.set()

    async def run(self) -> None:
        """Until the saga ended or was given back.

        Raises:
            LeaseLost: another worker has it.
            InfrastructureError: nobody knows what was written: take it again.
        """
        try:
            while not self.course.over:
                await self._round()
        finally:
            self.abandon()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def abandon(self) -> None:
        """Cancel the steps that run side by side."""
        for task in self._tasks.values():
            task.cancel()

    async def _round(self) -> None:
        self._nudge.clear()
        course = self.course
        decision = course.decide()
        if decision.turn or decision.end is not None:
            return await self.stepper.write()
        if self._stopping and not self._tasks:
            return await self._give_back(0.0)
        fresh = [work for work in decision.begin if work.path not in self._tasks]
        ready = [work for work in fresh if self._waiter.is_ready(work)]
        if not ready or (self._stopping and self._tasks):
            return await self._wait(fresh)
        if len(ready) == 1 and not self._tasks:
            return await self._do(ready[0])
        for work in ready:
            if not isinstance(work.part, SagaStep):
                return await self._do(work)
        if course.unwritten:
            return await self.stepper.write()
        for work in ready:
            course.at_work.add(work.path)
            self._tasks[work.path] = asyncio.create_task(self._do(work))

    async def _do(self, work: Work) -> None:
        if isinstance(work.part, SagaStep):
            await self.stepper.do(work)
        else:
            await self._waiter.do(work)

    async def _wait(self, fresh: Sequence[Work]) -> None:
        """Until a step that is under way ends, something is due, or somebody nudges."""
        now, due = time.monotonic(), self.course.due
        next_due = min((due.get(work.path, math.inf) for work in fresh), default=math.inf) - now
        if not self._tasks:
            for_others = all(isinstance(work.part, Signal) for work in fresh)
            if next_due > _PATIENCE or for_others:
                return await self._give_back(next_due)
        elif not self.course.journal.turned:
            next_due = min(next_due, self.course.deadline - now if self.course.deadline > now else math.inf)
        nudged = asyncio.create_task(self._nudge.wait())
        try:
            timeout = None if next_due == math.inf else max(0.0, next_due)
            await asyncio.wait({nudged, *self._tasks.values()}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            nudged.cancel()
        for path in [path for path, task in self._tasks.items() if task.done()]:
            self._tasks.pop(path).result()

    async def _give_back(self, wake_in: float) -> None:
        draft = self.course.giving_back(wake_in)
        self.course.written(draft, await self._recorder.write(draft.record))
