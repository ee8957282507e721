"""One trace through a saga, whoever runs it and however often."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from soma_common.errors import StepRefused
from soma_common.events.store import ALL_TENANTS
from soma_common.sagas.models import Saga, SagaContext, SagaStatus, Tx, with_compensation
from soma_common.tracing.tracer import TransactionTracer
from tests.core_support import event
from tests.saga_support import TENANT, Sagas

exporter = InMemorySpanExporter()


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Iterator[TransactionTracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    exporter.clear()
    yield TransactionTracer()


async def unreserve(number: int, tx: Tx) -> None: ...


@with_compensation(unreserve)
async def reserve(number: int, tx: Tx) -> None:
    tx.publish(event(event_type="stock.reserved", tenant_id=TENANT))


async def pay(number: int, ctx: SagaContext) -> None:
    if number == 1:
        raise StepRefused("no")


SAGA = Saga("traced", int, reserve, pay)


async def test_steps_events_and_compensations_join_the_trace_of_the_start(
    sagas: Sagas, tracer: TransactionTracer
) -> None:
    from soma_common.sagas.orchestrator import SagaOrchestrator

    orchestrator = SagaOrchestrator(sagas.pool)
    with tracer.span("checkout") as checkout:
        assert checkout is not None
        saga_id = await orchestrator.start_saga(SAGA, 1, tenant_id=TENANT)
    async with sagas.worker(SAGA):
        view = await sagas.ended(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert view.trace_id == checkout.trace_id
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"checkout", "traced reserve", "traced pay", "traced undo reserve"}
    for name in ("traced reserve", "traced pay", "traced undo reserve"):
        context, parent = spans[name].context, spans[name].parent
        assert context is not None
        assert parent is not None
        assert (f"{context.trace_id:032x}", f"{parent.span_id:016x}") == (checkout.trace_id, checkout.span_id)
    assert spans["traced pay"].status.description == "StepRefused: no"
    (found,) = await sagas.events.query(tenant_id=ALL_TENANTS)
    reserved = spans["traced reserve"].context
    assert reserved is not None
    assert (found.trace_id, found.trace.span_id) == (checkout.trace_id, f"{reserved.span_id:016x}")


async def test_without_a_trace_the_saga_makes_one(sagas: Sagas) -> None:
    view = await sagas.run(SAGA, 2)
    (found,) = await sagas.events.query(tenant_id=ALL_TENANTS)
    assert found.trace_id == view.trace_id
    assert len(view.trace_id) == 32
