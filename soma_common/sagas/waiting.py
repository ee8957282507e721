"""What a saga decides and waits for: rules, timers, signals, replies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from soma_common.errors import ValidationError
from soma_common.postgres.bounds import SHORT
from soma_common.sagas import replies
from soma_common.sagas.course import Course
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.machine import Work
from soma_common.sagas.outcomes import Failed, entry_of
from soma_common.sagas.recorder import lost
from soma_common.sagas.stepping import Parts, Stepper
from soma_common.sagas.steps import Ask, Signal, SubSaga, Timer
from soma_common.sagas.values import decode, encode, seconds_of

log = logging.getLogger(__name__)
_REFUSED: Final = 0  # in place of the number of the entry that took a signal


class Waiter:
    """Answers rules and ends waits of one claimed saga."""

    def __init__(self, parts: Parts, course: Course, stepper: Stepper) -> None:
        self._p, self._course, self._stepper = parts, course, stepper
        self._looked: dict[str, int] = {}

    def is_ready(self, work: Work) -> bool:
        """Whether there may be something to do for it now."""
        is_due = self._course.due.get(work.path, 0.0) <= self._course.now()
        if work.undo or not isinstance(work.part, Signal | Ask):
            return is_due
        fresh = self._looked.get(work.path, -1) < self._course.claimed.signals
        return fresh or (work.path in self._course.due and is_due)

    async def do(self, work: Work) -> None:
        """Go on with it, as far as it goes now."""
        match work.part:
            case Timer():
                self._timer(work)
            case Signal():
                await self._signal(work)
            case Ask():
                await self._ask(work)
            case _:
                self._answer(work)
        if self._course.at_work and self._course.unwritten:  # others could take the entry into their records, too
            await self._stepper.write()

    def _answer(self, work: Work) -> None:
        """Ask a rule, once. Its answer is written with what rests on it."""
        part = work.part
        adapter = part.saga.input if isinstance(part, SubSaga) else work.saga.results[part.name]
        try:
            answer = encode(adapter, self._asked(work), f"What {work.path} says")
            entry = Entry(what=What.DONE, step=work.path, attempt=1, result=answer)
        except Exception as error:
            entry = _failed(work, error)
        self._course.note(entry)

    def _asked(self, work: Work) -> Any:
        course, call = self._course, work.saga.calls[work.part.name]
        return call.function(**course.values.arguments(call, work, course.journal, tx=None, context=None))

    def _timer(self, work: Work) -> None:
        if self._course.journal.of_step(work.path).begun:
            self._course.note(Entry(what=What.DONE, step=work.path, attempt=1))
            return
        wait = work.part.wait
        try:
            seconds = seconds_of(self._asked(work) if callable(wait) else wait)
            entry = Entry(what=What.WAITING, step=work.path, attempt=1, due_in=seconds)
        except Exception as error:
            entry = _failed(work, error)
        self._course.note(entry)

    async def _signal(self, work: Work) -> None:
        course, part = self._course, work.part
        if await self._came(work, part.name, self._received):
            return
        if work.path not in course.due:
            if not course.journal.of_step(work.path).begun:
                course.note(Entry(what=What.WAITING, step=work.path, attempt=1, due_in=part.timeout_seconds))
        elif course.due[work.path] <= course.now():
            if part.optional:
                course.note(Entry(what=What.DONE, step=work.path, attempt=1, result=b"null"))
            else:
                error = TimeoutError(f"no signal {part.name} came within {part.timeout_seconds:g} s")
                course.note(_failed(work, error))

    async def _came(self, work: Work, name: str, meaning: Callable[[Work, bytes], Entry]) -> bool:
        """Whether a signal came that says something; it is taken, and those before it that say nothing."""
        course = self._course
        self._looked[work.path] = course.claimed.signals
        while (found := await self._p.store.next_signal(course.claimed.saga_id, name)) is not None:
            signal_id, payload = found
            try:
                entry = meaning(work, payload)
            except Exception as error:
                log.warning("Saga %s: signal %s is refused: %s", course.claimed.saga_id, signal_id, error)
                await self._take(signal_id, None)
            else:
                await self._take(signal_id, entry)
                return True
        return False

    def _received(self, work: Work, payload: bytes) -> Entry:
        adapter = work.saga.results[work.part.name]
        result = encode(adapter, decode(adapter, payload), f"Signal {work.part.name}")
        return Entry(what=What.DONE, step=work.path, attempt=1, result=result)

    async def _ask(self, work: Work) -> None:
        course, part = self._course, work.part
        if work.undo or not course.journal.of_step(work.path).begun:
            await self._send(work)
            return
        if await self._came(work, replies.name_of(work.path), self._answered):
            return
        if work.path in course.due and course.due[work.path] <= course.now():
            error = TimeoutError(f"no reply came within {part.timeout_seconds:g} s")
            late = Failed(error, unknown=True, took=part.timeout_seconds, final=True)
            await self._stepper.write(*(entry_of(what, work, 0, late) for what in (What.UNKNOWN, What.FAILED)))

    async def _send(self, work: Work) -> None:
        """The command, or what takes it back, in the commit that writes its entry."""
        course = self._course
        call = work.saga.undos[work.part.name] if work.undo else work.saga.calls[work.part.name]
        try:
            event = call.function(**course.values.arguments(call, work, course.journal, tx=None, context=None))
            command = replies.command(event, course.context(work), number=work.saga.number(work.part.name))
        except Exception as error:
            await self._stepper.fail(work, Failed(error, unknown=False, took=0.0, final=True))
            return
        entry = Entry(what=What.WAITING, step=work.path, attempt=1, due_in=work.part.timeout_seconds)
        if work.undo:
            entry = Entry(what=What.UNDONE, step=work.path, attempt=course.number(work))
        draft = course.draft(entry)
        try:
            async with self._p.store.pool.transaction(bound=SHORT) as tx:
                await self._p.runner.publish([command], tx, course.context(work))
                seen = await self._p.store.record([draft.record], tx)
                if not seen:
                    raise lost(draft.record)
        except ValidationError as error:
            await self._stepper.fail(work, Failed(error, unknown=False, took=0.0, final=True))
        else:
            course.written(draft, seen[0])

    def _answered(self, work: Work, payload: bytes) -> Entry:
        answer = replies.answer(payload)
        if answer.error_type is not None:
            return Entry(what=What.FAILED, step=work.path, attempt=1, error_type=answer.error_type, error=answer.error)
        result = encode(work.saga.results[work.part.name], answer.result, f"The reply to {work.path}")
        return Entry(what=What.DONE, step=work.path, attempt=1, result=result)

    async def _take(self, signal_id: str, entry: Entry | None) -> None:
        """Take a signal in the commit that writes its entry."""
        course = self._course
        draft = course.draft(*([entry] if entry else []))
        place = len(draft.record.entries) - len(draft.fresh) + 1
        async with self._p.store.pool.transaction(bound=SHORT) as tx:
            seen = await self._p.store.record([draft.record], tx)
            if not seen:
                raise lost(draft.record)
            number = seen[0].base + place if entry else _REFUSED
            await self._p.store.take_signal(course.claimed.saga_id, signal_id, number, tx)
        course.written(draft, seen[0])


def _failed(work: Work, error: Exception) -> Entry:
    return entry_of(What.FAILED, work, 0, Failed(error, unknown=False, took=0.0))
