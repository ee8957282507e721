"""One trace through a saga, whoever runs it and however often."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from soma_common.errors import StepRefused
from soma_common.events.store import ALL_TENANTS
from soma_common.sagas.models import Saga, SagaContext, SagaStatus, Tx, with_compensation
from soma_common.tracing.tracer import TransactionTracer
from tests.core_support import event
from tests.saga_support import TENANT, Sagas
from tests.span_support import Spans, is_child, provider_of_the_application


@pytest.fixture
def spans() -> Iterator[Spans]:
    with provider_of_the_application() as spans:
        yield spans


async def unreserve(number: int, tx: Tx) -> None: ...


@with_compensation(unreserve)
async def reserve(number: int, tx: Tx) -> None:
    tx.publish(event(event_type="stock.reserved", tenant_id=TENANT))


async def pay(number: int, ctx: SagaContext) -> None:
    if number == 1:
        raise StepRefused("no")


SAGA = Saga("traced", int, reserve, pay)


async def test_steps_events_and_compensations_join_the_trace_of_the_start(sagas: Sagas, spans: Spans) -> None:
    from soma_common.sagas.orchestrator import SagaOrchestrator

    orchestrator = SagaOrchestrator(sagas.pool)
    with TransactionTracer().span("checkout") as checkout:
        assert checkout is not None
        saga_id = await orchestrator.start_saga(SAGA, 1, tenant_id=TENANT)
    async with sagas.worker(SAGA):
        view = await sagas.ended(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert view.trace_id == checkout.trace_id
    assert spans.names() == ["checkout", "start traced", "traced pay", "traced reserve", "traced undo reserve"]
    start = spans.one("start traced")
    assert is_child(start, spans.one("checkout"))
    for name in ("traced reserve", "traced pay", "traced undo reserve"):
        assert is_child(spans.one(name), start)
        attributes = dict(spans.one(name).attributes or {})
        assert attributes.pop("soma.saga.id") == str(saga_id)
        assert attributes.pop("error.type", "") == ("StepRefused" if name == "traced pay" else "")
        assert attributes == {
            "soma.saga.name": "traced", "soma.saga.step": name.split()[-1], "soma.saga.attempt": 1,
            "soma.saga.undoing": "undo" in name, "soma.tenant.id": TENANT,
            "messaging.message.conversation_id": str(saga_id),
        }  # fmt: skip
    assert spans.one("traced pay").status.description == "StepRefused: no"
    (found,) = await sagas.events.query(tenant_id=ALL_TENANTS)
    reserved = spans.one("traced reserve").context
    assert reserved is not None
    assert (found.trace_id, found.trace.span_id) == (checkout.trace_id, f"{reserved.span_id:016x}")


async def test_without_a_trace_the_saga_makes_one(sagas: Sagas) -> None:
    view = await sagas.run(SAGA, 2)
    (found,) = await sagas.events.query(tenant_id=ALL_TENANTS)
    assert found.trace_id == view.trace_id
    assert len(view.trace_id) == 32
