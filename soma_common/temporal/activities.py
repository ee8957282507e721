"""The activities: a step's action or compensation, a rule, and what finds out about a step whose worker fell silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any
from uuid import UUID

from temporalio import activity
from temporalio.exceptions import ApplicationError

from soma_common.dlq.failures import Failure, Stage
from soma_common.errors import (
    DatabaseUnavailable,
    InfrastructureError,
    OutcomeUnknown,
    SagaDefinitionError,
    TransactionConflict,
)
from soma_common.events.store import EventStore
from soma_common.postgres.errors import sqlstate_of, translate
from soma_common.postgres.threads import Connect, Threads, connecting
from soma_common.sagas.attempts import CONFLICTED, MOST_CONFLICTS, Attempt, Runner, StepRaised
from soma_common.sagas.context import SagaContext
from soma_common.sagas.machine import Work
from soma_common.sagas.models import Saga
from soma_common.sagas.outcomes import Failed, failed
from soma_common.sagas.parameters import Call
from soma_common.sagas.steps import SagaStep, SubSaga, Timer, Unknown
from soma_common.sagas.values import Values, encode, seconds_of
from soma_common.temporal import effects, names
from soma_common.temporal.messages import Answer, Ask, Report, check_size
from soma_common.temporal.needs import journal_of, local, work_at
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx

Activity = Callable[[Ask], Awaitable[Answer]]
Sagas = Mapping[tuple[str, int], Saga]


class Activities:
    """Does what workflows ask for.

    Args:
        store: records the events of transactional steps; its database is where they work.
        sagas: the definitions, by name and version.
        connect: connections for plain functions with a transaction; None: psycopg's, to the same database.
    """

    def __init__(self, store: EventStore, sagas: Sagas, connect: Connect | None = None) -> None:
        self._store, self._sagas = store, sagas
        self.threads: Threads | None = None
        if any(saga.has_blocking_transactions for saga in sagas.values()):
            self.threads = Threads(connect or connecting(store.pool.settings), "soma saga steps")
        room = max(1, store.pool.settings.size - 2)  # some connections stay for finding out
        self._runner = Runner(store.pool, self._append, transactions=room, threads=self.threads)

    def all(self) -> Sequence[Activity]:
        """One activity for each step, compensation and rule, as Temporal's worker takes them."""
        found: dict[str, Activity] = {}
        for saga in self._sagas.values():
            found |= {name: _named(name, self._do) for name in names.of_steps(saga)}
            for name, do in ((names.of_check(saga), self._check), (names.of_settling(saga), self._settle)):
                found[name] = _named(name, do)
        return list(found.values())

    async def _do(self, ask: Ask) -> Answer:
        work = self._work(ask)
        return await (self._attempt(ask, work) if isinstance(work.part, SagaStep) else self._rule(ask, work))

    def _work(self, ask: Ask) -> Work:
        """The step that is meant. One that this worker does not have is left to another, or to its next release."""
        saga = self._sagas.get((ask.saga, ask.version))
        if saga is None:
            raise ApplicationError(f"This worker has no saga {ask.saga} of version {ask.version}.", type="NotHere")
        try:
            return work_at(saga, ask.step, undo=ask.undo)
        except SagaDefinitionError as error:
            raise ApplicationError(str(error), type="NotHere") from error

    # Steps.

    async def _attempt(self, ask: Ask, work: Work) -> Answer:
        part: SagaStep = work.part
        call = work.saga.undos[part.name] if ask.undo else work.saga.calls[part.name]
        attempt = Attempt(work, ask.attempt, part.undo.timeout_seconds if ask.undo else part.timeout_seconds)
        try:
            async with _alive():
                do = self._transactional if call.transactional else self._external
                return await do(ask, work, call, attempt)
        except ApplicationError:
            raise  # a report
        except (asyncio.CancelledError, InfrastructureError) as away:
            if call.transactional or ask.undo or part.unknown is Unknown.RETRY:
                raise  # Temporal tries again, under the same key
            unknown = OutcomeUnknown(str(away) or "The worker stopped.")
            raise _reported(Failed(unknown, unknown=True, took=attempt.took)) from away
        except Exception as raised:
            error = raised.error if isinstance(raised, StepRaised) else raised
            raise _reported(failed(work, error, attempt.took, transactional=call.transactional)) from error

    async def _external(self, ask: Ask, work: Work, call: Call, attempt: Attempt) -> Answer:
        value = await self._runner.call(call, self._filling(ask, work, call), _context(ask), attempt)
        try:
            return Answer(result=_text(work, value), took=attempt.took)
        except Exception as error:  # of what it returned: it happened
            raise _reported(Failed(error, unknown=True, took=attempt.took, final=True)) from error

    async def _transactional(self, ask: Ask, work: Work, call: Call, attempt: Attempt) -> Answer:
        for conflicts in range(MOST_CONFLICTS):
            try:
                return await self._in_transaction(ask, work, call, attempt)
            except TransactionConflict as error:
                last = error
            await asyncio.sleep(CONFLICTED.delay(conflicts))
        raise StepRaised(last)

    async def _in_transaction(self, ask: Ask, work: Work, call: Call, attempt: Attempt) -> Answer:
        """Effect, events and outcome commit together, once, however often Temporal has this step done."""
        context = _context(ask)
        async with self._runner.transaction(attempt, blocking=call.blocking) as connection:
            done = await effects.begin(connection, context.key, ask.attempt)
            if done is not None:
                return Answer(result=done.result.decode())
            try:
                value = await self._runner.call(call, self._filling(ask, work, call), context, attempt, connection)
                result = _text(work, value)
            except StepRaised as raised:
                raise _meaning(raised, connection, attempt) from raised.error
            await effects.keep(connection, context.key, result.encode())
        return Answer(result=result, took=attempt.took)

    async def _append(self, events: Any, connection: Any) -> Any:
        return await self._store.publish(events, tx=connection)

    def _filling(self, ask: Ask, work: Work, call: Call) -> Callable[[Tx | None], dict[str, Any]]:
        """Makes what the function is called with, seen from inside of its loops."""
        values = Values(self._sagas[ask.saga, ask.version], (ask.input or "null").encode())
        inside, journal, context = work._replace(prefix=local(work.prefix)), journal_of(ask.results), _context(ask)
        return lambda tx: values.arguments(call, inside, journal, tx=tx, context=context)

    async def _settle(self, ask: Ask) -> Answer:
        async with _alive():
            done = await effects.settle(self._store.pool, _context(ask).key, ask.attempt)
        return Answer(result=None if done is None else done.result.decode())

    # Rules, and values from outside.

    async def _rule(self, ask: Ask, work: Work) -> Answer:
        part = work.part
        call = work.saga.calls[part.name]
        try:
            said = call.function(**self._filling(ask, work, call)(None))
            if isinstance(part, Timer):
                return Answer(result=json.dumps(seconds_of(said)))
            adapter = part.saga.input if isinstance(part, SubSaga) else work.saga.results[part.name]
            text = encode(adapter, said, f"What {work.path} says").decode()
            check_size(f"What {work.path} says", text)
        except Exception as error:
            raise _reported(Failed(error, unknown=False, took=0.0, final=True)) from error
        return Answer(result=text)

    async def _check(self, ask: Ask) -> Answer:
        work = self._work(ask)
        adapter = self._sagas[ask.saga, ask.version].adapter(ask.step)
        try:
            value = adapter.validate_json(ask.payload or "null")
            return Answer(result=encode(adapter, value, f"The value for {work.path}").decode())
        except Exception as error:
            raise _reported(Failed(error, unknown=False, took=0.0, final=True)) from error


def _named(name: str, do: Activity) -> Activity:
    @activity.defn(name=name)
    async def named(ask: Ask) -> Answer:
        return await do(ask)

    return named


def _text(work: Work, value: Any) -> str:
    if work.undo:
        return "null"
    what = f"The result of {work.path}"
    text = encode(work.saga.results[work.part.name], value, what).decode()
    check_size(what, text)
    return text


def _context(ask: Ask) -> SagaContext:
    return SagaContext(
        saga_id=UUID(ask.saga_id), saga=ask.saga, version=ask.version, step=ask.step, attempt=ask.attempt,
        tenant_id=ask.tenant_id, correlation_id=ask.correlation_id, undoing=ask.undo,
        trace=TraceContext.parse(ask.traceparent, ask.tracestate),
    )  # fmt: skip


@asynccontextmanager
async def _alive() -> AsyncIterator[None]:
    """Give signs of life: a worker that dies is noticed long before a slow step would be late."""
    timeout = activity.info().heartbeat_timeout
    if timeout is None:
        yield
        return

    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(timeout.total_seconds() / 3)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


def _meaning(raised: StepRaised, connection: Any, attempt: Attempt) -> Exception:
    """What an error in a transaction is: the step's, or (a conflict, the loss of the connection) nobody's."""
    if isinstance(raised.error, TimeoutError) and attempt.took >= attempt.timeout:
        return raised
    if connection.is_closed():
        return DatabaseUnavailable(f"The connection to PostgreSQL was lost in a step: {raised.error!s:.200}.")
    known = translate(raised.error) if sqlstate_of(raised.error) else raised.error
    return known if isinstance(known, TransactionConflict) else raised


def _reported(failure: Failed) -> ApplicationError:
    """A failure, as the workflow is told of it."""
    told = Failure.of(Stage.HANDLE, failure.error)
    report = Report(
        error_type=told.error_type, error=told.message, stack=told.stack, took=failure.took, unknown=failure.unknown,
        final=failure.final,
    )  # fmt: skip
    return ApplicationError(told.message, asdict(report), type=told.error_type, non_retryable=True)
