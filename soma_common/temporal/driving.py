"""Drives a saga inside of a workflow: asks the machine what is next and has activities do it.

Deterministic: time, chance and outcomes come from Temporal's history. No code of the saga's author runs here; actions,
compensations, rules and checks of values are activities.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from soma_common.errors import EventTooLarge
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Decision, End, Work, decide, is_behind_pivot
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.outcomes import Failed, entries_of
from soma_common.sagas.steps import SagaStep, Signal, Timer
from soma_common.sagas.values import Values
from soma_common.temporal.calls import Calls
from soma_common.temporal.messages import Answer, Report, Start, check_size, entry_of, plain

_EARLY: Final = 0.001  # seconds by which a timer may be early: Temporal counts in milliseconds
_STATUS: Final = {End.COMPLETED: SagaStatus.COMPLETED, End.COMPENSATED: SagaStatus.COMPENSATED}


class Drive:
    """One saga, from its start to its end.

    ``stuck``: the step it waits for a person at; empty where it is none in particular; None: it is not stuck.
    """

    def __init__(self, saga: Saga, start: Start, calls: Calls) -> None:
        self.saga, self._start, self._calls = saga, start, calls
        self.entries = [entry_of(fields) for fields in start.journal]
        self.journal = Journal.of(self.entries)
        self.stuck: str | None = None
        self.ended: End | None = None
        self._signals = {name: deque(payloads) for name, payloads in start.signals.items()}
        self._asked, self._cancelled = start.asked, False
        self._began = start.began if start.began is not None else workflow.info().start_time.timestamp()
        now = workflow.time()
        self._due = {path: now + state.due for path, state in self.journal.steps.items() if state.due is not None}
        self._tasks: dict[str, asyncio.Task[list[Entry]]] = {}
        self._poked = False
        self._too_large = 0

    @property
    def status(self) -> SagaStatus:
        """Where it stands."""
        if self.ended is not None:
            return _STATUS[self.ended]
        if self.stuck is not None:
            return SagaStatus.STUCK
        return SagaStatus.COMPENSATING if self.journal.turned else SagaStatus.RUNNING

    @property
    def behind_pivot(self) -> bool:
        """Whether there is no way back."""
        return is_behind_pivot(self.saga, self.journal)

    # What comes from outside.

    def signal(self, name: str, payload: str) -> None:
        """Keep a signal until a step takes it."""
        self._signals.setdefault(name, deque()).append(payload)
        self._poked = True

    def turn(self, why: str) -> None:
        """Go back as soon as that can be done."""
        self._asked = self._asked or why
        self._poked = True

    def note(self, entry: Entry) -> None:
        """Write what a person asked for."""
        self._write([entry])

    def unstick(self, entry: Entry) -> None:
        """Write what a person decided, and go on."""
        self._write([entry])
        self.stuck, self._poked = None, True
        workflow.set_current_details("")

    # The loop.

    async def run(self) -> Any:
        """Until it ends: what it gives.

        Raises:
            ApplicationError: of type SagaCompensated: it failed, and what it had done is undone.
        """
        while self.ended is None:
            if self._is_long():
                self._go_on()
            await self._round()
        if self.ended is End.COMPENSATED:
            raise self._undone()
        result = Values(self.saga, b"null").result(self.journal)
        return None if result is None else json.loads(result)

    async def _round(self) -> None:
        decision = self._decide()
        if decision.turn:
            return self._write([Entry(what=What.TURNED, why=decision.reason or self._asked or "deadline")])
        if decision.end is End.STUCK:
            return await self._be_stuck(decision.reason)
        if decision.end is not None:
            self.ended = decision.end
            return self._write([Entry(what=What.ENDED)])
        now, idle = workflow.time(), True
        for work in decision.begin:
            if work.path not in self._tasks:
                idle &= not self._begin(work, due=self._due.get(work.path, 0.0) <= now + _EARLY)
        if idle:
            await self._wait(self._next_due(decision) - workflow.time())
        return None

    def _decide(self) -> Decision:
        wanted = self._asked is not None or workflow.time() >= self._began + self.saga.deadline
        return decide(self.saga, self.journal, turn_wanted=wanted, at_work=bool(self._tasks))

    def _next_due(self, decision: Decision) -> float:
        """When the next thing is to be done, though nothing ends and nobody calls."""
        waiting = [self._due[w.path] for w in decision.begin if w.path not in self._tasks and w.path in self._due]
        deadline = self._began + self.saga.deadline
        if self._asked is None and not self.journal.turned and workflow.time() < deadline:
            waiting.append(deadline)
        return min(waiting, default=math.inf)

    async def _wait(self, seconds: float) -> None:
        """Until a step ends, somebody calls, or so many seconds have passed."""
        timeout = None if seconds == math.inf else max(seconds, _EARLY)
        await self._until(lambda: self._poked or any(task.done() for task in self._tasks.values()), timeout)
        self._poked = False
        for path in [path for path, task in self._tasks.items() if task.done()]:
            self._write(self._tasks.pop(path).result())

    async def _until(self, condition: Any, timeout: float | None = None) -> None:
        """Wait; a cancelled workflow turns its saga around."""
        try:
            await workflow.wait_condition(condition, timeout=timeout)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if self._cancelled or workflow.cancellation_reason() is None:
                raise  # it leaves the worker's cache
            self._cancelled = True
            self._write([Entry(what=What.CANCEL)])
            self.turn("the workflow was cancelled")

    async def _be_stuck(self, reason: str | None) -> None:
        self.stuck = reason or next((path for path, state in self.journal.steps.items() if state.failed), "")
        self._write([Entry(what=What.STUCK, why=self.stuck)])
        workflow.set_current_details(f"Stuck at {self.stuck}: it waits for retry, skip or resolve.")
        while self.stuck is not None:
            await self._until(lambda: self.stuck is None)

    def _write(self, entries: Sequence[Entry]) -> None:
        now = workflow.time()
        for entry in entries:
            self._due.pop(entry.step, None)
            if entry.due_in is not None:
                self._due[entry.step] = now + entry.due_in
        self.entries.extend(entries)
        self.journal = self.journal.after(*entries)

    def _undone(self) -> BaseException:
        if self._cancelled:
            return asyncio.CancelledError()
        first = next((e for e in self.entries if e.what is What.FAILED), None)
        why = next(e.why for e in self.entries if e.what is What.TURNED)
        cause = f"step {first.step} failed ({first.error_type}: {first.error})" if first else f"it turned around: {why}"
        return ApplicationError(
            f"Saga {self.saga.name}: {cause}; what it had done is undone.", type="SagaCompensated", non_retryable=True
        )

    # A history that grew long goes on in a new run.

    def _is_long(self) -> bool:
        info = workflow.info()
        quiet = not self._tasks and not self._cancelled and workflow.all_handlers_finished()
        grown = len(self.entries) > max(self._too_large, len(self._start.journal))
        return quiet and grown and info.is_continue_as_new_suggested()

    def _go_on(self) -> None:
        now = workflow.time()
        state = {path: max(0.0, due - now) for path, due in self._due.items()}
        journal = [plain(replace(e, due_in=state.get(e.step)) if e.due_in is not None else e) for e in self.entries]
        start = replace(
            self._start, saga_id=str(self._calls.saga_id), version=self.saga.version, began=self._began,
            journal=journal, signals={name: list(waiting) for name, waiting in self._signals.items() if waiting},
            asked=self._asked,
        )  # fmt: skip
        try:
            check_size("The journal", json.dumps([start.input, journal, start.signals]))
        except EventTooLarge as error:  # it goes on here, as far as Temporal lets it
            workflow.logger.warning("%s", error)
            self._too_large = 2 * len(self.entries)
        else:
            workflow.continue_as_new(start)

    # Doing. What says True changed the journal at once.

    def _begin(self, work: Work, *, due: bool) -> bool:
        match work.part:
            case Signal():
                return self._signal(work, due=due)
            case _ if not due:
                return False
            case Timer():
                return self._timer(work)
            case _:
                self._tasks[work.path] = asyncio.create_task(self._step(work))
                return False

    def _signal(self, work: Work, *, due: bool) -> bool:
        part: Signal = work.part
        waiting = self._signals.get(part.name)
        if waiting:
            self._tasks[work.path] = asyncio.create_task(self._taken(work, waiting.popleft()))
            return False
        if part.timeout_seconds is None:
            return False
        if not self.journal.of_step(work.path).begun:
            self._write([Entry(what=What.WAITING, step=work.path, attempt=1, due_in=part.timeout_seconds)])
            return True
        if not due:
            return False
        if part.optional:
            self._write([Entry(what=What.DONE, step=work.path, attempt=1, result=b"null")])
        else:
            error = f"no signal {part.name} came within {part.timeout_seconds:g} s"
            self._write([_given_up(work, "TimeoutError", error)])
        return True

    def _timer(self, work: Work) -> bool:
        if callable(work.part.wait) and not self.journal.of_step(work.path).begun:
            self._tasks[work.path] = asyncio.create_task(self._step(work))
            return False
        if self.journal.of_step(work.path).begun:
            self._write([Entry(what=What.DONE, step=work.path, attempt=1)])
        else:
            self._write([Entry(what=What.WAITING, step=work.path, attempt=1, due_in=work.part.wait)])
        return True

    async def _taken(self, work: Work, payload: str) -> list[Entry]:
        """A signal whose payload is none of the step's is refused, and the step goes on waiting."""
        answer = await self._calls.check(work, payload)
        if isinstance(answer, Report):
            workflow.logger.warning("A signal %s is refused: %s", work.part.name, answer.error)
            return []
        return [_done(work, 1, answer)]

    async def _step(self, work: Work) -> list[Entry]:
        """An attempt of a step, or a rule that is asked."""
        if not isinstance(work.part, SagaStep):
            return await self._ruled(work)
        state = self.journal.of_step(work.path)
        number = (state.undo_attempts if work.undo else state.attempts) + 1
        outcome = await self._calls.attempt(work, number, self.journal)
        if isinstance(outcome, Answer):
            return [_done(work, number, outcome)]
        return self._failed(work, outcome)

    async def _ruled(self, work: Work) -> list[Entry]:
        answer = await self._calls.rule(work, self.journal)
        if isinstance(answer, Report):
            return [_given_up(work, answer.error_type, answer.error, answer.stack)]
        if isinstance(work.part, Timer):
            return [Entry(what=What.WAITING, step=work.path, attempt=1, due_in=json.loads(answer.result or "0"))]
        return [_done(work, 1, answer)]

    def _failed(self, work: Work, report: Report) -> list[Entry]:
        """Our own rules say what follows; chance is the workflow's, so that a replay waits as long."""
        state = self.journal.of_step(work.path)
        failure = Failed(Exception(report.error), report.unknown, report.took or 0.0, report.final)
        policy, failures = (
            (work.part.undo.retry, state.undo_failures) if work.undo else (work.part.retry, state.failures)
        )
        return [
            replace(
                entry, error_type=report.error_type, error=report.error,
                stack=report.stack if entry.due_in is None else None,
                due_in=None if entry.due_in is None else policy.delay(failures, workflow.random().uniform),
            )
            for entry in entries_of(work, state, failure, one_way=self.behind_pivot)
        ]  # fmt: skip


def _done(work: Work, number: int, answer: Answer) -> Entry:
    if work.undo:
        return Entry(what=What.UNDONE, step=work.path, attempt=number, took=answer.took)
    result = None if answer.result is None else answer.result.encode()
    return Entry(what=What.DONE, step=work.path, attempt=number, result=result, took=answer.took)


def _given_up(work: Work, error_type: str, error: str, stack: str | None = None) -> Entry:
    return Entry(what=What.FAILED, step=work.path, attempt=1, error_type=error_type, error=error, stack=stack)
