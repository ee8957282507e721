"""Drives one saga: asks the machine what is next, and does it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from soma_common.sagas.course import Course
from soma_common.sagas.machine import Work
from soma_common.sagas.models import Saga
from soma_common.sagas.stepping import Parts, Stepper
from soma_common.sagas.steps import Ask, SagaStep, Signal
from soma_common.sagas.store import Seen
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

    @property
    def saga(self) -> Saga:
        """Its definition."""
        return self.course.saga

    def stop(self) -> None:
        """Begin nothing new; give it back when what is under way has ended."""
        self._stopping = True
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

    def nudge(self) -> None:
        """Look again: the clock was set."""
        self._nudge.set()

    def see(self, seen: Seen) -> None:
        """What others want of it by now."""
        course = self.course
        if (seen.asked, seen.signals) == (course.claimed.asked, course.claimed.signals):
            return
        course.claimed = replace(course.claimed, asked=seen.asked, signals=seen.signals)
        if seen.asked == "cancel" and not course.journal.turned and not course.one_way:
            for attempt in self.stepper.attempts.values():
                attempt.interrupt()
        self._nudge.set()

    def abandon(self) -> None:
        """Cancel the steps that run side by side."""
        for task in self._tasks.values():
            task.cancel()

    async def _round(self) -> None:
        self._nudge.clear()
        decision = self.course.decide()
        if decision.turn or decision.end is not None:
            await self.stepper.write()
        elif self._stopping and not self._tasks:
            await self._give_back(0.0)
        else:
            fresh = [work for work in decision.begin if work.path not in self._tasks]
            ready = [] if self._stopping else [work for work in fresh if self._waiter.is_ready(work)]
            await (self._begin(ready) if ready else self._wait(fresh))

    async def _begin(self, ready: Sequence[Work]) -> None:
        """One by itself; several side by side, once what they rest on is written."""
        course = self.course
        first = next((work for work in ready if not isinstance(work.part, SagaStep)), ready[0])
        if not isinstance(first.part, SagaStep) or (len(ready) == 1 and not self._tasks):
            await self._do(first)
        elif course.unwritten:
            await self.stepper.write()
        else:
            for work in ready:
                course.at_work.add(work.path)  # at once: what the first one writes must know of the second
                self._tasks[work.path] = asyncio.create_task(self._do(work))

    async def _do(self, work: Work) -> None:
        if not isinstance(work.part, SagaStep):
            await self._waiter.do(work)
            return
        self.course.at_work.add(work.path)
        try:
            await self.stepper.do(work)
        finally:
            self.course.at_work.discard(work.path)

    async def _wait(self, fresh: Sequence[Work]) -> None:
        """Until a step that is under way ends, something is due, or somebody nudges."""
        course, now = self.course, self.course.now()
        next_due = min((course.due.get(work.path, math.inf) for work in fresh), default=math.inf) - now
        if not self._tasks:
            for_others = all(isinstance(work.part, Signal | Ask) for work in fresh)
            if next_due > _PATIENCE or for_others:
                await self._give_back(next_due)
                return
        if now < course.deadline:
            next_due = min(next_due, course.deadline - now)
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
