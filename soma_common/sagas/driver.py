"""Drives one saga: asks the machine what is next, does it, and writes what became of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.errors import InfrastructureError, LeaseLost, TransactionConflict
from soma_common.events.models import Event
from soma_common.retry import Backoff
from soma_common.sagas.attempts import Attempt, Runner
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Decision, End, Work, decide, is_behind_pivot
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.outcomes import Failed, entries_of, failed
from soma_common.sagas.recorder import Recorder, lost
from soma_common.sagas.steps import SagaStep, Signal, SubSaga, Timer, Unknown
from soma_common.sagas.store import Claimed, Record, SagaStore, Seen
from soma_common.sagas.values import Values, encode, seconds_of

_PATIENCE: Final = 1.0  # seconds for which a saga that waits is kept; for longer it is given back
_STATUS: Final = {
    End.COMPLETED: SagaStatus.COMPLETED, End.COMPENSATED: SagaStatus.COMPENSATED, End.STUCK: SagaStatus.STUCK,
}  # fmt: skip
_CONFLICTED: Final = Backoff(base=0.005, maximum=0.5)
_MOST_CONFLICTS: Final = 20


@dataclass(frozen=True, slots=True)
class Parts:
    """What all sagas of a worker share."""

    store: SagaStore
    recorder: Recorder
    runner: Runner


class Driver:
    """One claimed saga, until it has ended or is given back.

    Args:
        entries: its journal so far.
        hung: a step that was left behind with its worker's former driver, and how.
    """

    def __init__(
        self,
        parts: Parts,
        saga: Saga,
        claimed: Claimed,
        entries: Sequence[Entry],
        hung: tuple[str, Failed] | None = None,
    ) -> None:
        self._p, self.saga, self.claimed = parts, saga, claimed
        self.attempts: dict[str, Attempt] = {}
        self.stopping = False
        self._journal, self._values = Journal.of(entries), Values(saga, claimed.input)
        now = time.monotonic()
        self._deadline = now + claimed.left
        self._due = {path: now + state.due for path, state in self._journal.steps.items() if state.due is not None}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unwritten: list[Entry] = []
        self._doubtful: set[str] = set()
        self._over = False
        if claimed.doubtful:
            self._doubt()

    def _doubt(self) -> None:
        """Its former worker fell silent: whatever could have been under way then may have been."""
        for work in decide(self.saga, self._journal).begin:
            self._doubtful.add(work.path)
            state = self._journal.of_step(work.path)
            if state.begun and isinstance(work.part, SagaStep):  # its policy wants to know
                ...

    async def run(self) -> None:
        """Until the saga ended or was given back.

        Raises:
            LeaseLost: another worker has it.
            InfrastructureError: nobody knows what was written: take it again.
        """
        try:
            while not self._over:
                await self._round()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _round(self) -> None:
        decision = self._decide(self._journal, alone=not self._tasks)
        if decision.turn or decision.end is not None:
            return await self._write(())
        if self.stopping and not self._tasks:
            return await self._give_back(0.0)
        now = time.monotonic()
        fresh = [work for work in decision.begin if work.path not in self._tasks]
        ready = [work for work in fresh if self._due.get(work.path, 0.0) <= now]
        if len(ready) == 1 and not self._tasks:
            return await self._do(ready[0])
        for work in [] if self.stopping else ready:
            self._tasks[work.path] = asyncio.create_task(self._do(work))
        next_due = min((self._due[work.path] for work in fresh if work not in ready), default=math.inf)
        if self._tasks:
            return await self._wait(min(next_due, self._deadline) - now)
        if next_due - now > _PATIENCE:
            return await self._give_back(next_due - now)
        await asyncio.sleep(next_due - now)

    async def _wait(self, seconds: float) -> None:
        """Until a step that is under way ends, or something else is due."""
        timeout = None if seconds <= 0 or seconds == math.inf else seconds
        done, _ = await asyncio.wait(self._tasks.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for path in [path for path, task in self._tasks.items() if task in done]:
            self._tasks.pop(path).result()

    def _decide(self, journal: Journal, *, alone: bool) -> Decision:
        wanted = self.claimed.asked is not None or time.monotonic() >= self._deadline
        return decide(self.saga, journal, turn_wanted=wanted, doubtful=self._doubtful, at_work=not alone)

    # Writing.

    async def _write(self, entries: Sequence[Entry], tx: Any = None) -> None:
        """Write entries, with what follows from them at once."""
        record, fresh = self._record(entries)
        if tx is None:
            self._written(record, fresh, await self._p.recorder.write(record))
            return
        seen = await self._p.store.record([record], tx)
        if not seen:
            raise lost(record)
        self._in_tx = (record, fresh, seen[0])

    def _record(self, entries: Sequence[Entry]) -> tuple[Record, list[Entry]]:
        """A saga that turns, ends or is stuck does so in the same commit as what led to it."""
        unwritten, self._unwritten = self._unwritten, []
        fresh, journal = list(entries), self._journal.after(*entries)
        alone = len(self._tasks) <= bool(entries)
        record = Record(saga=self.claimed)
        while record.kept:
            decision = self._decide(journal, alone=alone)
            if decision.turn:
                why = decision.reason or self.claimed.asked or "deadline"
                follows = Entry(what=What.TURNED, why=why)
                record = replace(record, status=SagaStatus.COMPENSATING)
            elif decision.end is not None:
                follows = Entry(what=What.STUCK if decision.end is End.STUCK else What.ENDED, why=decision.reason)
                result = self._values.result(journal) if decision.end is End.COMPLETED else None
                record = replace(record, status=_STATUS[decision.end], kept=False, result=result)
            else:
                break
            fresh.append(follows)
            journal = journal.after(follows)
        return replace(record, entries=(*unwritten, *fresh)), fresh

    def _written(self, record: Record, fresh: Sequence[Entry], seen: Seen) -> None:
        self._journal = self._journal.after(*fresh)
        self._over = not record.kept
        self.claimed = replace(self.claimed, asked=seen.asked, signals=seen.signals)

    def _note(self, entry: Entry) -> None:
        """An entry that may be written later: what it says can be found out again."""
        self._unwritten.append(entry)
        self._journal = self._journal.after(entry)
        if entry.due_in is not None:
            self._due[entry.step] = time.monotonic() + entry.due_in

    async def _give_back(self, wake_in: float) -> None:
        """Nothing can be done before then."""
        if not self._journal.turned and not self._is_one_way():
            wake_in = min(wake_in, max(0.0, self._deadline - time.monotonic()))
        record = Record(
            saga=self.claimed, entries=tuple(self._unwritten), kept=False,
            wake_in=None if wake_in == math.inf else wake_in,
        )  # fmt: skip
        await self._p.recorder.write(record)
        self._over = True

    def _is_one_way(self) -> bool:
        return is_behind_pivot(self.saga, self._journal)

    # Doing.

    async def _do(self, work: Work) -> None:
        match work.part:
            case SagaStep():
                await self._step(work)
            case Timer():
                await self._timer(work)
            case Signal():
                await self._signal(work)
            case _:
                self._rule(work)

    async def _step(self, work: Work) -> None:
        part = work.part
        call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
        if not call.transactional:
            await self._announce(work)
        for conflicts in range(_MOST_CONFLICTS):
            attempt = Attempt(part.undo.timeout_seconds if work.undo else part.timeout_seconds)
            self.attempts[work.path] = attempt
            try:
                await self._attempt(work, call, attempt)
                return
            except TransactionConflict as error:
                if conflicts == _MOST_CONFLICTS - 1:
                    failure = failed(work, error, attempt.took, transactional=True)
                    break
            except (LeaseLost, InfrastructureError, asyncio.CancelledError, KeyboardInterrupt):
                raise
            except BaseException as error:
                failure = failed(work, error, attempt.took, transactional=call.transactional)
                break
            finally:
                del self.attempts[work.path]
            await asyncio.sleep(_CONFLICTED.delay(conflicts))
        await self._fail(work, failure)

    async def _announce(self, work: Work) -> None:
        """Before an external step: what it rests on is durable; and that it begins, if its policy needs to know."""
        if not work.undo and work.part.unknown is not Unknown.RETRY:
            number = self._journal.of_step(work.path).attempts + 1
            await self._write((Entry(what=What.BEGUN, step=work.path, attempt=number),))
        elif self._unwritten:
            await self._write(())

    async def _attempt(self, work: Work, call: Any, attempt: Attempt) -> None:
        state = self._journal.of_step(work.path)
        number = (state.undo_attempts if work.undo else state.attempts) + 1
        context = self._context(work, number)
        if not call.transactional:
            arguments = self._values.arguments(call, work, self._journal, tx=None, context=context)
            value = await self._p.runner.call(call, arguments, context, attempt)
            await self._write((self._done(work, number, value, attempt.took),))
            return
        async with self._p.runner.transaction(attempt, blocking=call.blocking) as connection:
            tx = Tx(connection)
            arguments = self._values.arguments(call, work, self._journal, tx=tx, context=context)
            value = await self._p.runner.call(call, arguments, context, attempt, connection)
            entry = self._done(work, number, value, attempt.took)
            await self._p.runner.publish(tx, connection)
            record, fresh = self._record((entry,))
            seen = await self._p.store.record([record], connection)
            if not seen:
                raise lost(record)
        self._written(record, fresh, seen[0])

    def _done(self, work: Work, number: int, value: Any, took: float) -> Entry:
        if work.undo:
            return Entry(what=What.UNDONE, step=work.path, attempt=number, took=took)
        result = encode(work.saga.results[work.part.name], value, f"The result of {work.path}")
        return Entry(what=What.DONE, step=work.path, attempt=number, result=result, took=took)

    async def _fail(self, work: Work, failure: Failed) -> None:
        self._doubtful.discard(work.path)
        entries = entries_of(work, self._journal.of_step(work.path), failure, one_way=self._is_one_way())
        for entry in entries:
            if entry.due_in is not None:
                self._due[work.path] = time.monotonic() + entry.due_in
        await self._write(entries)

    def _context(self, work: Work, number: int) -> SagaContext:
        claimed = self.claimed
        return SagaContext(
            saga_id=claimed.saga_id, saga=self.saga.name, version=self.saga.version, step=work.path, attempt=number,
            tenant_id=claimed.tenant_id, correlation_id=claimed.correlation_id, undoing=work.undo, trace=claimed.trace,
        )  # fmt: skip

    # Waiting and deciding.

    def _rule(self, work: Work) -> None:
        """Ask a rule, once. Its answer is written with what rests on it."""
        part = work.part
        adapter = part.saga.input if isinstance(part, SubSaga) else work.saga.results[part.name]
        what = f"What {work.path} says"
        self._note(Entry(what=What.DONE, step=work.path, attempt=1, result=encode(adapter, self._asked(work), what)))

    def _asked(self, work: Work) -> Any:
        call = work.saga.calls[work.part.name]
        return call.function(**self._values.arguments(call, work, self._journal, tx=None, context=None))

    async def _timer(self, work: Work) -> None:
        if self._journal.of_step(work.path).begun:
            self._note(Entry(what=What.DONE, step=work.path, attempt=1))
        else:
            wait = self._asked(work) if callable(work.part.wait) else work.part.wait
            self._note(Entry(what=What.WAITING, step=work.path, attempt=1, due_in=seconds_of(wait)))
