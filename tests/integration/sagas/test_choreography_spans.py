"""Every step and compensation of a choreography has a span with a name, in the trace of the first event."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan

from soma_common.events.store import EventFilter
from soma_common.sagas.models import SagaStatus
from soma_common.tracing.context import TraceContext
from tests.integration.sagas.shop import TENANT, OrderPlaced, OrderRejected, Running, event, standalone, whole
from tests.span_support import provider_of_the_application


async def test_spans_have_names_and_lead_from_event_to_event(soma_database: str) -> None:
    first = TraceContext.new()
    with provider_of_the_application() as spans:
        async with Running(standalone(soma_database), whole()) as shop:
            await shop.publish(event(OrderPlaced(order_id="1"), trace=first))
            await shop.stands(SagaStatus.COMPLETED)
            await shop.publish(event(OrderRejected(order_id="1"), trace=first))
            await shop.stands(SagaStatus.COMPENSATED)
            events = await shop.soma.store.query(EventFilter(tenant_id=TENANT, correlation_id="o-1"))
    steps = [span for span in spans.all() if span.name.startswith("order ")]
    assert {span.name for span in steps} == {
        "order shop/note", "order shop/reserve", "order shop/confirm", "order undo shop/reserve", "order undo shop/note"
    }  # fmt: skip
    assert {span.context and f"{span.context.trace_id:032x}" for span in spans.all()} == {first.trace_id}
    by_id = {span.context.span_id: span for span in spans.all() if span.context}

    def before(span: ReadableSpan) -> ReadableSpan | None:
        return by_id.get(span.parent.span_id) if span.parent else None

    path, now = [], spans.one("order shop/confirm")
    while now is not None:
        path.append(now.name)
        now = before(now)
    assert path == [
        "order shop/confirm", "process soma.events", "append soma.events",
        "order shop/reserve", "process soma.events", "append soma.events",
    ]  # fmt: skip
    reserved = next(each for each in events if each.event_type == "stock.reserved")
    append = by_id[int(reserved.trace.span_id, 16)]
    assert append.name == "append soma.events"
    assert before(append) is spans.one("order shop/reserve")
