"""Starts sagas, tells where they stand, and does to them what people want."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from soma_common.errors import ConfigurationError, SagaCompensated, SagaStuck, WrongSagaState
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.sagas import asking
from soma_common.sagas.asking import Asking, Dialogue
from soma_common.sagas.ends import Ends
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.starting import begin
from soma_common.sagas.store import NORMAL, Start
from soma_common.sagas.values import ANY, decode, encode, encode_any
from soma_common.sagas.views import KnownSaga, SagaFilter, SagaPage, SagaView, saga_id_of
from soma_common.tracing.conventions import starting
from soma_common.tracing.tracer import TransactionTracer
from soma_common.tx import connection_of

Answer = TypeVar("Answer")
_PROGRAM: Final = "program"  # who did it, where nobody is named
_PATIENCE: Final = 60.0  # seconds


class SagaOrchestrator:
    """Sagas of one database, for programs and people. Workers run them; see :class:`SagaWorker`.

    Args:
        pool: the database.
        sagas: definitions by which results are given back as values of their types.
        woken: called after a saga was started or changed: a worker in this process looks at once.
    """

    def __init__(self, pool: Pool, sagas: Iterable[Saga] = (), *, woken: Callable[[], None] = lambda: None) -> None:
        self._pool, self._woken = pool, woken
        self._sagas = {saga.key: saga for saga in sagas}
        self._ends = Ends(pool)
        self._tracer = TransactionTracer()

    async def start_saga(
        self, saga: Saga, given: Any, *, tenant_id: str, saga_key: str | None = None,
        correlation_id: str | None = None, priority: int = NORMAL, tx: Any = None,
    ) -> UUID:  # fmt: skip
        """Begin a saga; its id.

        Args:
            given: what it is started with, of the definition's input type.
            saga_key: the same saga with the same key and tenant is started once, and the second call gives its id.
            correlation_id: the business transaction it belongs to; where it is left out, that of the request or event
                at hand, else its own id.
            priority: 1 (most urgent) to 5.
            tx: a :class:`Tx` or an open connection (asyncpg, async psycopg): it begins when that commits.

        Raises:
            ValidationError: the input is not of its type, or a name that cannot be.
            SagaKeyReused: it was started under this key with another input.
        """
        with self._tracer.doing(starting(saga)) as trace:
            start = begin(
                saga, given, tenant_id=tenant_id, saga_key=saga_key, correlation_id=correlation_id, priority=priority,
                trace=trace,
            )  # fmt: skip
            return (await self.start_sagas([start], tx=tx))[0]

    async def start_sagas(self, starts: Sequence[Start], *, tx: Any = None) -> list[UUID]:
        """Begin many sagas in one statement, all or none; made by :func:`begin`. Their ids, in order."""
        if not starts:
            return []
        self._sagas.update((each.saga.key, each.saga) for each in starts)
        return await self._asked(asking.start(starts), tx)

    async def get_saga(self, saga_id: UUID | str) -> SagaView:
        """Where a saga stands, with its journal.

        Raises:
            SagaNotFound: there is no such saga.
        """
        return await self._asked(asking.show(saga_id))

    async def list(
        self, wanted: SagaFilter | None = None, *, cursor: str | None = None, limit: int = 100, **conditions: Any
    ) -> SagaPage:
        """A page of sagas, the newest first; conditions are those of :class:`SagaFilter`.

        Raises:
            TenantRequired, ValidationError: what was asked for cannot be.
        """
        return await self._asked(asking.find(SagaFilter.of(wanted, conditions), cursor, limit))

    async def known(self) -> Sequence[KnownSaga]:
        """The definitions that workers have, or had, by name and version."""
        return await self._asked(asking.known())

    async def result(self, saga_id: UUID | str, *, timeout: float = _PATIENCE) -> Any:
        """What a saga came to: the result of its last step, as a value of its type.

        Raises:
            SagaCompensated, SagaStuck: it did not complete.
            SagaNotFound: there is no such saga.
            TimeoutError: it did not end within ``timeout`` seconds.
        """
        stands = await self._asked(asking.standing(saga_id))
        given = saga_id_of(saga_id)
        try:
            async with asyncio.timeout(timeout):
                end = await self._ends.of(given)
        except TimeoutError:
            stands = await self._asked(asking.standing(saga_id))
            raise TimeoutError(f"Saga {given} ({stands.name}) is {stands.status} after {timeout:g} s.") from None
        return self._result(end)

    def _result(self, end: Row) -> Any:
        saga_id, name, version, status, result, reason, error_type, error = end
        told = f"Saga {saga_id} ({name}) is {status} because of {reason}: {error_type or ''} {error or ''}".strip()
        if status == SagaStatus.COMPENSATED:
            raise SagaCompensated(f"{told}.")
        if status == SagaStatus.STUCK:
            raise SagaStuck(f"{told}.", cure=f"see `somastack saga inspect {saga_id}`.")
        text = None if result is None else result.encode()
        saga = self._sagas.get((name, version))
        if saga is None or saga.returns is None:
            return decode(ANY, text)
        return decode(saga.results[saga.returns], text)

    async def signal(
        self, saga_id: UUID | str, name: str, payload: Any = None, *, signal_id: str | None = None,
        who: str | None = None, tx: Any = None,
    ) -> bool:  # fmt: skip
        """Send a signal; it is kept until the saga comes to where it waits for it.

        Args:
            signal_id: the same signal twice is one; False then.

        Raises:
            SagaNotFound, WrongSagaState: there is no such saga, or it ended.
            ValidationError: the payload is no JSON, or not what the saga waits for.
        """
        return await self._asked(asking.signal(saga_id, name, payload, signal_id=signal_id, who=who), tx)

    async def compensate(self, saga_id: UUID | str, *, reason: str, who: str = _PROGRAM) -> bool:
        """Let a saga turn around: what is under way ends first. False when that was asked before.

        Raises:
            SagaNotFound, WrongSagaState: there is no such saga; it ended, turned, or is behind its pivot.
        """
        return await self._asked(asking.ask(saga_id, "compensate", who=who, why=reason))

    async def cancel(self, saga_id: UUID | str, *, reason: str, who: str = _PROGRAM) -> bool:
        """As :meth:`compensate`, but a step that is under way is cancelled, as if its time were up."""
        return await self._asked(asking.ask(saga_id, "cancel", who=who, why=reason))

    async def retry(self, saga_id: UUID | str, *, why: str, who: str = _PROGRAM) -> None:
        """Try the step again at which a saga is stuck, with all its retries.

        Raises:
            SagaNotFound, WrongSagaState: there is no such saga, or it is not stuck.
        """
        await self._asked(asking.unstick(saga_id, "retry", None, who=who, why=why))

    async def skip(self, saga_id: UUID | str, *, why: str, who: str = _PROGRAM) -> None:
        """Pass over the step, or the compensation, at which a saga is stuck. The step's result is None then.

        Raises:
            SagaNotFound, WrongSagaState: there is no such saga, it is not stuck at a step, or others need its result.
        """
        stands = await self._asked(asking.standing(saga_id))
        saga = self._sagas.get((stands.name, stands.version))
        if saga is not None and stands.reason and not stands.turned and saga.is_needed(stands.reason):
            raise WrongSagaState(
                f"Saga {saga_id} cannot go on without the result of {stands.reason}.",
                cure="say it: resolve(happened=True, result=...).",
            )
        await self._asked(asking.unstick(saga_id, "skip", None, who=who, why=why))

    async def resolve(
        self, saga_id: UUID | str, *, happened: bool, why: str, result: Any = None, who: str = _PROGRAM
    ) -> None:
        """Say what happened at the step at which a saga is stuck.

        Args:
            happened: it took effect, with this result; or (False) it did not, and the saga turns around. Of a
                compensation: it is undone.

        Raises:
            SagaNotFound, WrongSagaState: there is no such saga, or it is not stuck at a step.
            ValidationError: the result is not what the step returns.
        """
        stands = await self._asked(asking.standing(saga_id))
        text = self._step_result(stands, result) if happened and not stands.turned else None
        await self._asked(asking.unstick(saga_id, "done" if happened else "failed", text, who=who, why=why))

    def _step_result(self, stands: asking.Standing, result: Any) -> bytes:
        saga, what = self._sagas.get((stands.name, stands.version)), f"The result of {stands.reason}"
        if saga is None or not stands.reason:
            return encode_any(result, what)
        return encode(saga.adapter(stands.reason), result, what)

    async def forget(self, *, ended_before: datetime, dry_run: bool = False) -> int:
        """Remove sagas that ended before a moment, with their journals and signals; how many. Of every tenant.

        A few hundred in a transaction: broken off, it goes on where it is called again. Their events stay in the log;
        their keys may start sagas anew.

        Raises:
            ValidationError: that moment has not come yet, or it has no offset.
            ConfigurationError: the role may not: only the owner of the tables does it.
        """
        found = await self._asked(asking.ended_before(ended_before))
        if dry_run:
            return found
        gone, last = 0, asking.FORGOTTEN_AT_ONCE
        try:
            while last == asking.FORGOTTEN_AT_ONCE:
                last = await self._asked(asking.forget(ended_before))
                gone += last
        except ConfigurationError as error:
            raise ConfigurationError(error.message, cure="do it as the role that owns the tables.") from error
        return gone

    async def close(self) -> None:
        """Wait for no end any more."""
        await self._ends.close()

    async def _asked(self, question: Asking[Answer], tx: Any = None) -> Answer:
        if tx is not None:
            return await carried_out(question, connection_of(tx))
        async with self._pool.connection() as connection:
            answer = await carried_out(question, connection)
        self._woken()
        return answer


async def carried_out(question: Asking[Answer], connection: Any) -> Answer:
    """The answer to a question, asked on a connection."""
    dialogue = Dialogue(question)
    while dialogue.statement is not None:
        dialogue.hand_over(await fetch(connection, *dialogue.statement))
    return dialogue.answer
