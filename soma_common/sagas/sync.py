"""Sagas for synchronous code: psycopg 3 and Django.

sagas = SagaOrchestrator()

with transaction.atomic():
    order.save()
    sagas.start_saga(place_order, Order(...), connection, tenant_id="shop")   # begins when the order commits
"""

from __future__ import annotations

from typing import Any, TypeVar
from uuid import UUID

from soma_common.postgres.sync import fetch_sync
from soma_common.sagas import asking
from soma_common.sagas.asking import Asking, Dialogue
from soma_common.sagas.models import Saga
from soma_common.sagas.starting import begin
from soma_common.sagas.store import NORMAL
from soma_common.sagas.views import SagaView
from soma_common.tracing.conventions import starting
from soma_common.tracing.tracer import TransactionTracer
from soma_common.tx import connection_of

Answer = TypeVar("Answer")


class SagaOrchestrator:
    """Starts sagas in the transaction of the caller's connection, and tells where they stand. Never commits.

    The rules and errors are those of ``soma_common.SagaOrchestrator``. ``connection`` is psycopg's, Django's
    (``django.db.connection``), or the :class:`Tx` of a scope.
    """

    def __init__(self) -> None:
        self._tracer = TransactionTracer()

    def start_saga(
        self, saga: Saga, given: Any, connection: Any, *, tenant_id: str, saga_key: str | None = None,
        correlation_id: str | None = None, priority: int = NORMAL,
    ) -> UUID:  # fmt: skip
        """Begin a saga when the connection's transaction commits; its id."""
        with self._tracer.doing(starting(saga)) as trace:
            start = begin(
                saga, given, tenant_id=tenant_id, saga_key=saga_key, correlation_id=correlation_id, priority=priority,
                trace=trace,
            )  # fmt: skip
            return _carried_out(asking.start([start]), connection)[0]

    def get_saga(self, saga_id: UUID | str, connection: Any) -> SagaView:
        """Where a saga stands, with its journal."""
        return _carried_out(asking.show(saga_id), connection)

    def signal(
        self, saga_id: UUID | str, name: str, payload: Any = None, connection: Any = None, *,
        signal_id: str | None = None, who: str | None = None,
    ) -> bool:  # fmt: skip
        """Send a signal when the connection's transaction commits; False when the same one came before."""
        return _carried_out(asking.signal(saga_id, name, payload, signal_id=signal_id, who=who), connection)

    def compensate(self, saga_id: UUID | str, connection: Any, *, reason: str, who: str = "program") -> bool:
        """Let a saga turn around, when the connection's transaction commits; False when that was asked before."""
        return _carried_out(asking.ask(saga_id, "compensate", who=who, why=reason), connection)


def _carried_out(question: Asking[Answer], connection: Any) -> Answer:
    connection = connection_of(connection)
    dialogue = Dialogue(question)
    while dialogue.statement is not None:
        dialogue.hand_over(fetch_sync(connection, *dialogue.statement))
    return dialogue.answer
