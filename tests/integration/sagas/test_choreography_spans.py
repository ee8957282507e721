"""Every step and compensation of a choreography has a span with a name, in the trace of the first event."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from soma_common.events.store import EventFilter
from soma_common.sagas.models import SagaStatus
from soma_common.tracing.context import TraceContext
from tests.integration.sagas.shop import TENANT, OrderPlaced, OrderRejected, Running, event, standalone, whole


async def test_spans_have_names_and_lead_from_event_to_event(
    soma_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    first = TraceContext.new()
    async with Running(standalone(soma_database), whole()) as shop:
        await shop.publish(event(OrderPlaced(order_id="1"), trace=first))
        await shop.stands(SagaStatus.COMPLETED)
        await shop.publish(event(OrderRejected(order_id="1"), trace=first))
        await shop.stands(SagaStatus.COMPENSATED)
        events = await shop.soma.store.query(EventFilter(tenant_id=TENANT, correlation_id="o-1"))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {
        "order shop/note", "order shop/reserve", "order shop/confirm", "order undo shop/reserve", "order undo shop/note"
    }  # fmt: skip
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {first.trace_id}
    reserved = next(each for each in events if each.event_type == "stock.reserved")
    reserve, confirm = spans["order shop/reserve"], spans["order shop/confirm"]
    assert reserved.trace.span_id == f"{reserve.context.span_id:016x}"
    assert confirm.parent is not None
    assert confirm.parent.span_id == reserve.context.span_id
