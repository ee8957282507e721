"""What a saga decides and waits for: rules, timers, signals."""

from __future__ import annotations

import logging
from typing import Any, Final

from soma_common.sagas.course import Course
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.machine import Work
from soma_common.sagas.outcomes import Failed, entry_of
from soma_common.sagas.recorder import lost
from soma_common.sagas.stepping import Parts, Stepper
from soma_common.sagas.steps import Signal, SubSaga, Timer
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
        if not isinstance(work.part, Signal):
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
        course = self._course
        self._looked[work.path] = course.claimed.signals
        while (found := await self._p.store.next_signal(course.claimed.saga_id, work.part.name)) is not None:
            signal_id, payload = found
            entry = self._received(work, signal_id, payload)
            await self._take(signal_id, entry)
            if entry is not None:
                return
        if work.path in course.due:
            if course.due[work.path] <= self._course.now():
                self._give_up(work)
        elif not course.journal.of_step(work.path).begun:
            course.note(Entry(what=What.WAITING, step=work.path, attempt=1, due_in=work.part.timeout_seconds))

    def _received(self, work: Work, signal_id: str, payload: bytes) -> Entry | None:
        """None: its payload is not what the saga waits for."""
        adapter = work.saga.results[work.part.name]
        try:
            result = encode(adapter, decode(adapter, payload), f"Signal {work.part.name}")
        except Exception as error:
            log.warning("Saga %s: signal %s is refused: %s", self._course.claimed.saga_id, signal_id, error)
            return None
        return Entry(what=What.DONE, step=work.path, attempt=1, result=result)

    async def _take(self, signal_id: str, entry: Entry | None) -> None:
        """Take a signal in the commit that writes its entry."""
        course = self._course
        draft = course.draft(*([entry] if entry else []))
        place = len(draft.record.entries) - len(draft.fresh) + 1
        async with self._p.store.pool.transaction() as tx:
            seen = await self._p.store.record([draft.record], tx)
            if not seen:
                raise lost(draft.record)
            number = seen[0].base + place if entry else _REFUSED
            await self._p.store.take_signal(course.claimed.saga_id, signal_id, number, tx)
        course.written(draft, seen[0])

    def _give_up(self, work: Work) -> None:
        part: Signal = work.part
        if part.optional:
            self._course.note(Entry(what=What.DONE, step=work.path, attempt=1, result=b"null"))
        else:
            error = TimeoutError(f"no signal {part.name} came within {part.timeout_seconds:g} s")
            self._course.note(_failed(work, error))


def _failed(work: Work, error: Exception) -> Entry:
    return entry_of(What.FAILED, work, 0, Failed(error, unknown=False, took=0.0))
