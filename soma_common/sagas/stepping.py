"""Does the steps of a saga: an attempt, what it came to, and its record."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.errors import (
    ClockAhead,
    ConfigurationError,
    DatabaseUnavailable,
    InfrastructureError,
    LeaseLost,
    LogError,
    MigrationError,
    OutcomeUnknown,
    TransactionConflict,
)
from soma_common.postgres.errors import sqlstate_of, translate
from soma_common.sagas.attempts import CONFLICTED, MOST_CONFLICTS, Attempt, Fill, Runner, StepRaised
from soma_common.sagas.context import SagaContext
from soma_common.sagas.course import Course
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.machine import Work
from soma_common.sagas.outcomes import Failed, entries_of, failed
from soma_common.sagas.parameters import Call
from soma_common.sagas.recorder import Recorder, lost
from soma_common.sagas.rig import REAL, Point, Rig
from soma_common.sagas.steps import Unknown
from soma_common.sagas.store import SagaStore
from soma_common.sagas.values import encode
from soma_common.tx import Tx

ENDING: Final = (ConfigurationError, MigrationError, LogError)
"""Of the library's own statements: no saga's fault, and no retry mends it. The worker ends with it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What all sagas of a worker share."""

    store: SagaStore
    recorder: Recorder
    runner: Runner
    rig: Rig = REAL


class Stepper:
    """Does the steps of one claimed saga."""

    def __init__(self, parts: Parts, course: Course) -> None:
        self._p, self._course = parts, course
        self.attempts: dict[str, Attempt] = {}

    async def do(self, work: Work) -> None:
        """Make one attempt at a step or its compensation, and write what it came to.

        Raises:
            LeaseLost: another worker has the saga.
            InfrastructureError: nobody knows what was written.
        """
        course, part = self._course, work.part
        call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
        if not call.transactional and not await self._announce(work):
            return
        attempt = Attempt(work, course.number(work), part.undo.timeout_seconds if work.undo else part.timeout_seconds)
        self.attempts[work.path] = attempt
        try:
            failure = await self._attempt(work, call, attempt)
            if failure is not None:
                await self.fail(work, failure)
        finally:
            del self.attempts[work.path]

    async def fail(self, work: Work, failure: Failed) -> None:
        """Write that an attempt failed. It tells of itself, not of one before it that its worker did not outlive."""
        course = self._course
        if not work.undo and not failure.final and work.path in course.doubtful:
            failure = replace(failure, unknown=True)
        await self.write(*entries_of(work, course.journal.of_step(work.path), failure, one_way=course.one_way))

    async def write(self, *entries: Entry) -> None:
        """Write entries with what follows from them; durable when this returns."""
        draft = self._course.draft(*entries)
        self._course.written(draft, await self._p.recorder.write(draft.record))

    async def _announce(self, work: Work) -> bool:
        """Before an external step: what it rests on is durable, and that it begins, if its policy needs to know.

        False: that it had begun before, and nobody knows how it ended, was written instead.
        """
        course = self._course
        if self._p.rig.now() > course.lease_ends:
            raise DatabaseUnavailable(f"The lease of saga {course.claimed.saga_id} could not be renewed.")
        if not work.undo and work.part.unknown is not Unknown.RETRY:
            if course.journal.of_step(work.path).begun:
                error = OutcomeUnknown("Its worker died, or could not write what it came to.")
                await self.fail(work, Failed(error, unknown=True, took=0.0))
                return False
            await self.write(Entry(what=What.BEGUN, step=work.path, attempt=course.number(work)))
            return not course.over and not course.journal.turned
        if course.unwritten:
            await self.write()
        return not course.over

    async def _attempt(self, work: Work, call: Call, attempt: Attempt) -> Failed | None:
        """None: it is done, and written."""
        if not call.transactional:
            return await self._external(work, call, attempt)
        for conflicts in range(MOST_CONFLICTS):
            try:
                return await self._transactional(work, call, attempt)
            except TransactionConflict as error:
                last = error
            await asyncio.sleep(CONFLICTED.delay(conflicts))
        return failed(work, last, attempt.took, transactional=True)

    async def _external(self, work: Work, call: Call, attempt: Attempt) -> Failed | None:
        context, probe = self._course.context(work), self._p.rig.probe
        attempt.begin()
        try:
            value = await self._p.runner.call(call, self._filling(work, call, context), context, attempt)
            entry = self._done(work, value, attempt)
        except StepRaised as raised:
            return failed(work, raised.error, attempt.took, transactional=False)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # of what it returned
            return Failed(error, unknown=True, took=attempt.took, final=True)
        await probe(Point.BEFORE_RECORD, context)
        await self.write(entry)
        await probe(Point.AFTER_COMMIT, context)
        return None

    async def _transactional(self, work: Work, call: Call, attempt: Attempt) -> Failed | None:
        course = self._course
        context, probe = course.context(work), self._p.rig.probe
        fill = self._filling(work, call, context)
        try:
            async with self._p.runner.transaction(attempt, blocking=call.blocking) as connection:
                try:
                    value = await self._p.runner.call(call, fill, context, attempt, connection)
                    draft = course.draft(self._encoded(work, value, attempt))
                except StepRaised as raised:
                    raise _meaning(raised, connection, attempt) from raised.error
                await probe(Point.BEFORE_RECORD, context)
                seen = await self._p.store.record([draft.record], connection)
                if not seen:
                    raise lost(draft.record)
                await probe(Point.BEFORE_COMMIT, context)
            await probe(Point.AFTER_COMMIT, context)
        except StepRaised as raised:
            return failed(work, raised.error, attempt.took, transactional=True)
        except (TransactionConflict, LeaseLost, InfrastructureError, *ENDING):
            raise
        except Exception as error:  # the step left its transaction behind so that it cannot be written to, or committed
            return failed(work, error, attempt.took, transactional=True)
        course.written(draft, seen[0])
        return None

    def _encoded(self, work: Work, value: Any, attempt: Attempt) -> Entry:
        try:
            return self._done(work, value, attempt)
        except Exception as error:  # of what it returned
            raise StepRaised(error) from error

    def _done(self, work: Work, value: Any, attempt: Attempt) -> Entry:
        number = self._course.number(work)
        if work.undo:
            return Entry(what=What.UNDONE, step=work.path, attempt=number, took=attempt.took)
        result = encode(work.saga.results[work.part.name], value, f"The result of {work.path}")
        return Entry(what=What.DONE, step=work.path, attempt=number, result=result, took=attempt.took)

    def _filling(self, work: Work, call: Call, context: SagaContext) -> Fill:
        """What makes the arguments of a function, from the journal as it is now."""
        course, journal = self._course, self._course.journal

        def fill(tx: Tx | None) -> dict[str, Any]:
            return course.values.arguments(call, work, journal, tx=tx, context=context)

        return fill


def _meaning(raised: StepRaised, connection: Any, attempt: Attempt) -> Exception:
    """What an error in a transaction is: the step's, or (a conflict, the loss of the connection) nobody's."""
    if isinstance(raised.error, TimeoutError) and attempt.took >= attempt.timeout:
        return raised
    if connection.is_closed():
        return DatabaseUnavailable(f"The connection to PostgreSQL was lost in a step: {raised.error!s:.200}.")
    known = translate(raised.error) if sqlstate_of(raised.error) else raised.error
    if isinstance(known, ClockAhead):  # this machine's clock: nothing can be published, and no saga is to blame
        return DatabaseUnavailable(known.message, cure=known.cure)
    return known if isinstance(known, TransactionConflict | InfrastructureError) else raised
