"""Drives one saga: asks the machine what is next, does it, and writes what became of it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import TypeAdapter

from soma_common.errors import (
    ClockAhead,
    HandlerTimeout,
    InfrastructureError,
    LeaseLost,
    OutcomeUnknown,
    StepRefused,
    TransactionConflict,
    ValidationError,
)
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool
from soma_common.sagas.context import SagaContext
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Decision, End, Work, decide
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.parameters import Call
from soma_common.sagas.recorder import Recorder, lost
from soma_common.sagas.steps import ForEach, SagaStep, SubSaga, Timer, Unknown, When
from soma_common.sagas.store import Claimed, Record, SagaStore, Seen
from soma_common.sagas.values import Values, encode
from soma_common.tx import Tx

log = logging.getLogger(__name__)

_PATIENCE: Final = 1.0  # seconds for which a saga that waits is kept; for longer it is given back
_STATUS: Final = {
    End.COMPLETED: SagaStatus.COMPLETED,
    End.COMPENSATED: SagaStatus.COMPENSATED,
    End.STUCK: SagaStatus.STUCK,
}
Append = Callable[[Sequence[Event], Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What all sagas of a worker share."""

    pool: Pool
    store: SagaStore
    recorder: Recorder
    append: Append


class Driver:
    """One claimed saga."""

    def __init__(self, parts: Parts, saga: Saga, claimed: Claimed, entries: Sequence[Entry]) -> None:
        self._p, self._saga, self._claimed = parts, saga, claimed
        self._journal = Journal.of(entries)
        self._values = Values(saga, claimed.input)
        self._began = time.monotonic()
        self._deadline = self._began + claimed.left
        self._due = {
            path: self._began + state.due for path, state in self._journal.steps.items() if state.due is not None
        }
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unwritten: tuple[Entry, ...] = ()
        self.stopping = False

    @property
    def claimed(self) -> Claimed:
        return self._claimed

    async def run(self) -> None:
        """Until the saga ended or was given back.

        Raises:
            LeaseLost: another worker has it.
            InfrastructureError: nobody knows what was written: take it again.
        """
        while True:
            if self.stopping and not self._tasks:
                return await self._give_back(0.0)
            decision = self._decide(self._journal)
            if decision.turn or decision.end is not None:
                if await self._settle(()):
                    return
                continue
            now = time.monotonic()
            due = [work for work in decision.begin if self._due.get(work.path, 0.0) <= now]
            if len(due) == 1 and not self._tasks:
                if await self._do(due[0]):
                    return
                continue
            ...
            waits = min(self._due[work.path] for work in decision.begin) - now
            if waits > _PATIENCE:
                return await self._give_back(waits)
            await asyncio.sleep(max(0.0, waits))

    def _decide(self, journal: Journal) -> Decision:
        wanted = self._claimed.asked is not None or time.monotonic() >= self._deadline
        return decide(self._saga, journal, turn_wanted=wanted, at_work=bool(self._tasks))

    # Writing.

    async def _settle(self, entries: Sequence[Entry], tx: Any = None) -> bool:
        """Write entries with what follows from them at once; whether the saga is not ours any more."""
        record, journal = self._record(entries)
        if tx is None:
            seen = await self._p.recorder.write(record)
        else:
            found = await self._p.store.record([record], tx)
            if not found:
                raise lost(record)
            seen = found[0]
        self._written(journal, seen)
        return not record.kept

    def _written(self, journal: Journal, seen: Seen) -> None:
        self._journal, self._unwritten = journal, ()
        self._claimed = replace(self._claimed, asked=seen.asked, signals=seen.signals)

    def _record(self, entries: Sequence[Entry]) -> tuple[Record, Journal]:
        every = [*self._unwritten, *entries]
        journal = self._journal.after(*entries)
        status: SagaStatus | None = None
        record = Record(saga=self._claimed)
        while True:
            decision = self._decide(journal)
            if decision.turn:
                entry = Entry(what=What.TURNED, step="", why=decision.reason)
                status = SagaStatus.COMPENSATING
            elif decision.end is not None:
                entry = Entry(what=What.STUCK if decision.end is End.STUCK else What.ENDED, why=decision.reason)
                status = _STATUS[decision.end]
                result = self._values.result(journal) if decision.end is End.COMPLETED else None
                record = replace(record, kept=False, result=result)
            else:
                break
            every.append(entry)
            journal = journal.after(entry)
            if decision.end is not None:
                break
        return replace(record, entries=tuple(every), status=status), journal

    async def _give_back(self, wake_in: float) -> None:
        left = max(0.0, self._deadline - time.monotonic())
        wakes = min(wake_in, left) if not self._journal.turned else wake_in
        await self._p.recorder.write(Record(saga=self._claimed, entries=self._unwritten, kept=False, wake_in=wakes))

    # Doing.

    async def _do(self, work: Work) -> bool:
        part = work.part
        if not isinstance(part, SagaStep):
            return self._compute(work)
        call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
        state = self._journal.of_step(work.path)
        attempt = (state.undo_attempts if work.undo else state.attempts) + 1
        began = time.monotonic()
        try:
            run = self._transactional if call.transactional else self._external
            return await run(work, call, attempt, began)
        except (LeaseLost, InfrastructureError, ClockAhead):
            raise
        except TransactionConflict:
            await asyncio.sleep(0.01)
            return False
        except asyncio.CancelledError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            unknown = not call.transactional and isinstance(error, OutcomeUnknown | TimeoutError)
            return await self._failed(work, attempt, error, unknown, time.monotonic() - began)

    async def _transactional(self, work: Work, call: Call, attempt: int, began: float) -> bool:
        part = work.part
        async with self._p.pool.transaction() as connection:
            tx = Tx(connection)
            value = await self._called(work, call, attempt, tx)
            entry = self._done(work, attempt, value, time.monotonic() - began)
            if tx.pending:
                await self._p.append(tx.pending, connection)
            record, journal = self._record((entry,))
            found = await self._p.store.record([record], connection)
            if not found:
                raise lost(record)
        self._written(journal, found[0])
        return not record.kept

    async def _external(self, work: Work, call: Call, attempt: int, began: float) -> bool:
        policy = work.part.unknown
        if not work.undo and policy is not Unknown.RETRY:
            await self._settle((Entry(what=What.BEGUN, step=work.path, attempt=attempt),))
        elif self._unwritten:
            await self._settle(())
        value = await self._called(work, call, attempt, None)
        return await self._settle((self._done(work, attempt, value, time.monotonic() - began),))

    async def _called(self, work: Work, call: Call, attempt: int, tx: Tx | None) -> Any:
        part = work.part
        timeout = part.undo.timeout_seconds if work.undo else part.timeout_seconds
        arguments = self._values.arguments(call, work, self._journal, tx=tx, context=self._context(work, attempt))
        pid = os.getpid()
        async with asyncio.timeout(timeout):
            value = await call.function(**arguments)
        if os.getpid() != pid:
            os._exit(70)
        return value

    def _context(self, work: Work, attempt: int) -> SagaContext:
        return SagaContext(
            saga_id=self._claimed.saga_id, saga=self._saga.name, version=self._saga.version, step=work.path,
            attempt=attempt, tenant_id=self._claimed.tenant_id, correlation_id=self._claimed.correlation_id,
            undoing=work.undo, trace=self._claimed.trace,
        )  # fmt: skip

    def _done(self, work: Work, attempt: int, value: Any, took: float) -> Entry:
        if work.undo:
            return Entry(what=What.UNDONE, step=work.path, attempt=attempt, took=took)
        result = encode(work.saga.results[work.part.name], value, f"The result of {work.path}")
        return Entry(what=What.DONE, step=work.path, attempt=attempt, result=result, took=took)

    async def _failed(self, work: Work, attempt: int, error: BaseException, unknown: bool, took: float) -> bool:
        part, state = work.part, self._journal.of_step(work.path)
        kind, message = type(error).__name__, str(error)[:4000]
        failures = state.undo_failures if work.undo else state.failures
        policy = part.undo if work.undo else part
        fatal = isinstance(error, (StepRefused, ValidationError, *part.fatal))
        again = failures < policy.max_retries and not fatal
        delay = policy.retry.delay(failures)
        common = {"step": work.path, "attempt": attempt, "error_type": kind, "error": message, "took": took}
        if work.undo:
            what = What.UNDO_RETRYING if again else What.UNDO_FAILED
            entries = [Entry(what=what, due_in=delay if again else None, **common)]
        elif unknown and part.unknown is not Unknown.RETRY:
            entries = [Entry(what=What.UNKNOWN, **common)]
            if part.unknown is Unknown.COMPENSATE:
                entries.append(Entry(what=What.FAILED, **common))
        elif again:
            entries = [Entry(what=What.UNKNOWN if unknown else What.RETRYING, due_in=delay, **common)]
        else:
            entries = [Entry(what=What.FAILED, **common)]
        if again:
            self._due[work.path] = time.monotonic() + delay
        log.debug("%s of saga %s failed: %r", work.path, self._claimed.saga_id, error)
        return await self._settle(entries)

    def _compute(self, work: Work) -> bool:
        part = work.part
        call = work.saga.calls.get(part.name)
        arguments = {} if call is None else self._values.arguments(call, work, self._journal, tx=None, context=None)
        value = call.function(**arguments) if call else None
        adapter = part.saga.input if isinstance(part, SubSaga) else work.saga.results[part.name]
        entry = Entry(
            what=What.DONE, step=work.path, attempt=1, result=encode(adapter, value, f"What {work.path} says")
        )
        self._unwritten = (*self._unwritten, entry)
        self._journal = self._journal.after(entry)
        return False
