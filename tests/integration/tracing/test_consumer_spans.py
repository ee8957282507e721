"""What a consumer shows: handlers of one event and of many, plain functions, failures, and letters done again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from soma_common import Event, Soma, SomaConfig, TransactionTracer, current_correlation_id, current_tenant
from soma_common.ambient import AMBIENT
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import RedrivePolicy
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.models import ReplayFilter, ReplayMode
from soma_common.tracing.context import TraceContext
from tests.span_support import Spans, is_child, linked, provider_of_the_application
from tests.waiting import until


@pytest.fixture
def spans() -> Iterator[Spans]:
    with provider_of_the_application() as spans:
        yield spans


def shop(dsn: str, **given: Any) -> Soma:
    return Soma(SomaConfig(service_id="shop", postgres_dsn=dsn), **given)


def event(number: int, **given: Any) -> Event:
    fields = {"payload": {}, "event_type": "order.placed", "aggregate_id": str(number), "tenant_id": "t"} | given
    return Event(**fields)


def traced(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


async def test_events_of_one_statement_share_an_append_and_have_a_process_each(
    soma_database: str, spans: Spans
) -> None:
    soma, other = shop(soma_database), TraceContext.new()

    @soma.handler("order.placed", consumer="a")
    async def handle(event: Any, ctx: Any) -> None:
        assert (current_tenant(), current_correlation_id()) == ("t", event.correlation_id)
        ctx.publish(Event(payload={}, event_type="invoice.written", aggregate_id=event.aggregate_id))

    async with soma:
        with TransactionTracer().span("request"):
            await soma.publish([event(1), event(2), event(3, trace=other)])
        await soma.drain()
        written = [e for e in (await soma.store.query(tenant_id="t")).events if e.event_type == "invoice.written"]
    ours, theirs = sorted(spans.named("append soma.events")[:2], key=lambda span: traced(span) == other.trace_id)
    assert is_child(ours, spans.one("request"))
    assert (ours.attributes or {})["messaging.batch.message_count"] == 2
    assert theirs.parent is not None
    assert f"{theirs.parent.span_id:016x}" == other.span_id
    processed = spans.named("process soma.events")
    assert sorted(is_child(span, ours) for span in processed) == [False, True, True]
    assert sorted(is_child(span, theirs) for span in processed) == [False, False, True]
    # What a handler publishes is a child of its own span, and carries the context of its append.
    appended = {f"{s.context.span_id:016x}": s for s in spans.named("append soma.events")[2:] if s.context}
    assert len(written) == 3
    for each in written:
        (cause,) = [p for p in processed if (p.attributes or {})["messaging.message.id"] == each.causation_id]
        assert is_child(appended[each.trace.span_id], cause)
        assert each.correlation_id == (cause.attributes or {})["messaging.message.conversation_id"]
    assert AMBIENT.get() is None


async def test_a_batch_of_several_traces_is_linked_to_them(soma_database: str, spans: Spans) -> None:
    soma, seen = shop(soma_database), list[int]()

    @soma.handler("order.placed", consumer="a", batch=True)
    async def handle(events: list[Any], ctx: Any) -> None:
        seen.append(len(events))
        assert current_tenant() == ("t" if len(events) == 1 else None)
        ctx.publish(*[Event(payload={}, event_type="x.y", aggregate_id="1", tenant_id="t")], cause=events[0])

    async with soma:
        first, second = await soma.publish(event(1)), await soma.publish(event(1))
        await soma.drain()
        (made, *_) = [e for e in (await soma.store.query(tenant_id="t")).events if e.event_type == "x.y"]
    ids = {int(each.trace.span_id, 16) for each in (*first, *second)}
    if seen == [2]:
        process = spans.one("process soma.events")
        assert (process.parent, linked(process)) == (None, ids)
        assert (process.attributes or {})["messaging.batch.message_count"] == 2
        settle = spans.one("settle soma.events")
        assert (settle.parent, linked(settle)) == (None, ids)
    else:  # they came one by one: each has its parent
        assert {span.parent.span_id for span in spans.named("process soma.events") if span.parent} == ids
    assert made.trace_id == first[0].trace_id  # the event goes on with its cause's trace


async def test_a_plain_function_knows_whom_it_works_for(soma_database: str, spans: Spans) -> None:
    soma, told = shop(soma_database), list[Any]()

    @soma.handler("order.placed", consumer="a")
    def handle(event: Any, ctx: Any) -> None:
        trace = TransactionTracer().current()
        told.append((current_tenant(), trace and trace.span_id, event.aggregate_id))

    async with soma:
        await soma.publish([event(1), event(2, tenant_id="u")])
        await soma.drain()
    ids = {(s.attributes or {})["soma.tenant.id"]: s.context and f"{s.context.span_id:016x}"
           for s in spans.named("process soma.events")}  # fmt: skip
    assert sorted(told) == [("t", ids["t"], "1"), ("u", ids["u"], "2")]


@pytest.mark.parametrize("with_provider", [True, False])
async def test_a_letter_that_is_done_again_is_another_trace(soma_database: str, with_provider: bool) -> None:
    broken = [True]
    policy = ConsumerSettings(retry=RetryPolicy(tries=1, parked=RedrivePolicy(tries=0)), redrive_every=0.05)
    soma = shop(soma_database, settings=policy)

    @soma.handler("order.placed", consumer="a")
    async def handle(event: Any, ctx: Any) -> None:
        if broken[0]:
            raise ValueError("not yet")
        ctx.publish(Event(payload={}, event_type="x.y", aggregate_id="1"))

    async def scenario() -> tuple[TraceContext, TraceContext]:
        async with soma:
            (first,) = await soma.publish(event(1))
            async with soma.consumer("a"), Pool(PoolSettings(soma_database, size=2)) as pool:
                letters = DLQHandler(pool, who="tests")
                await until(lambda: count(soma), what="a letter")
                broken[0] = False
                (letter,) = (await letters.list_dlq_events(tenant_id="t")).letters
                await letters.retry_event(letter.letter_id)
                await until(lambda: made(soma), what="the re-drive")
            return first.trace, (await made(soma))[0].trace

    async def count(soma: Soma) -> Any:
        return (await soma.pool.fetch("SELECT count(*) FROM soma.dead_letters WHERE status = 'dead'"))[0][0]

    async def made(soma: Soma) -> Any:
        return [e for e in (await soma.store.query(tenant_id="t")).events if e.event_type == "x.y"]

    if not with_provider:
        before, after = await scenario()
        assert after == before  # the trace travels as it is
        return
    with provider_of_the_application() as spans:
        before, after = await scenario()
    assert after.trace_id != before.trace_id
    failed, again = [*spans.named("process soma.events"), *spans.named("process")]
    assert failed.status.status_code.name == "ERROR"
    assert (failed.attributes or {})["error.type"] == "ValueError"
    assert (again.parent, linked(again)) == (None, {int(before.span_id, 16)})
    assert (again.attributes or {})["soma.delivery"] == "redrive"
    assert traced(again) == after.trace_id


async def test_a_replay_is_linked(soma_database: str, spans: Spans) -> None:
    soma = shop(soma_database)

    @soma.handler("order.placed", consumer="a")
    async def handle(event: Any, ctx: Any) -> None: ...

    async with soma:
        (first,) = await soma.publish(event(1))
        await soma.drain()
        async with soma.replays("a") as engine:
            wanted = ReplayFilter(tenant_id="t")
            run = await engine.start(wanted, ReplayMode.FORCE, requested_by="tests", reason="to see it")
            async for _ in engine.run(run.run_id):
                pass
    replay = spans.one("replay a")
    assert replay.parent is None
    assert (replay.attributes or {})["soma.replay.id"] == str(run.run_id)
    again = spans.named("process soma.events")[-1]
    assert is_child(again, replay)
    assert linked(again) == {int(first.trace.span_id, 16)}


async def test_a_transaction_without_a_name_has_a_span(soma_database: str, spans: Spans) -> None:
    async with shop(soma_database) as soma:
        async with soma.transaction() as tx:
            tx.publish(event(1))
            async with soma.transaction() as inner:
                inner.publish(event(2))
        with soma.sync_transaction() as plain:
            plain.publish(event(3))
    alone, sync = spans.named("transaction")
    appends = spans.named("append soma.events")
    assert [is_child(append, parent) for append, parent in zip(appends, (alone, sync), strict=True)] == [True, True]
