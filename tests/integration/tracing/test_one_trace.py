"""One trace through processes: request, transaction, append, relay, Kafka, consumer, saga, compensation, and the replay
that is linked to it; sent by OTLP to a real collector, and looked at as the tree that it is."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from soma_common import SagaStatus, Soma, SomaConfig
from soma_common.testing.backends import KafkaHandle
from soma_common.tracing.context import TraceContext
from tests.collector_server import Collector, SentSpan, collector, tree
from tests.waiting import until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Collector]:
    with collector(tmp_path) as receiver:
        yield receiver


@pytest.fixture
def env(soma_database: str, soma_kafka: KafkaHandle, receiver: Collector, tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA", "OTEL", "PYTEST"))}
    return clean | {
        "SOMA_DEPLOY_MODE": "somastack", "SOMA_SERVICE_ID": f"shop-{uuid4().hex[:8]}",
        "SOMASTACK_POSTGRES_DSN": soma_database, "SOMASTACK_KAFKA_BOOTSTRAP": soma_kafka.bootstrap,
        "SOMA_FOLDER": str(tmp_path / "soma"), "COLLECTOR": receiver.endpoint,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip


@contextmanager
def running(env: dict[str, str], *command: str) -> Iterator[subprocess.Popen[str]]:
    """A process; asked to end at the end, and then it ends well."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", *command], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM), command
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def compensated(env: dict[str, str]) -> None:
    """Until the saga of the order is undone."""
    async with Soma(SomaConfig.from_env(env)) as soma:

        async def is_undone() -> bool:
            page = await soma.sagas.list(tenant_id="acme", saga_key="o-1")
            return [view.status for view in page.sagas] == [SagaStatus.COMPENSATED]

        await until(is_undone, what="the compensation")


SHOP = "tests.integration.tracing.shop"


async def test_from_the_request_to_the_compensation_and_its_replay(env: dict[str, str], receiver: Collector) -> None:
    caller = TraceContext.new()
    headers = {
        "traceparent": caller.traceparent, "tracestate": "vendor=1", "X-Tenant-ID": "acme", "X-Correlation-ID": "c-1",
        "baggage": "plan=gold,secret=1",
    }  # fmt: skip
    with ExitStack() as stack:
        service = env["SOMA_SERVICE_ID"]
        relay_env = env | {"SOMASTACK_JAEGER_ENDPOINT": receiver.endpoint}
        stack.enter_context(running(relay_env, "soma_common.cli.main", "relay", "--name", service))
        stack.enter_context(running(env, SHOP, "consumer"))
        server = stack.enter_context(running(env, SHOP, "web"))
        url = f"http://127.0.0.1:{await asyncio.to_thread(line_of, server)}/orders/o-1"
        async with httpx.AsyncClient() as client:
            assert (await client.post(url)).status_code == 400
            answer = await client.post(url, headers=headers)
        assert (answer.status_code, answer.headers["X-Correlation-ID"]) == (202, "c-1")
        await compensated(env)
        await until(lambda: len(sent(receiver, caller)) >= 3, what="three appends sent by the relay")
    with running(env, SHOP, "replay") as replaying:
        assert await asyncio.to_thread(line_of, replaying) == "1"
        assert replaying.wait(60) == 0
    await until(lambda: [s for s in receiver.spans if s.name == "replay orders"], what="the replay's trace")

    topic = f"soma.{service}.events"
    spans = receiver.of(caller.trace_id)
    assert tree([span for span in spans if not span.name.startswith("send ")]) == [
        "?",
        "  POST /orders/{order} [server, web]",
        "    place-order [internal, web]",
        f"      append {topic} [producer, web]",
        f"        process {topic} [consumer, consumer]",
        "          start book [internal, consumer]",
        "            book pay [internal, consumer]",
        "            book reserve [internal, consumer]",
        f"              append {topic} [producer, consumer]",
        "            book undo reserve [internal, consumer]",
        f"              append {topic} [producer, consumer]",
        f"        settle {topic} [client, consumer]",
    ]
    (root,) = [span for span in spans if span.kind == "server"]
    assert root.parent_id == caller.span_id
    (pay,) = [span for span in spans if span.name == "book pay"]
    assert pay.error
    assert pay.attributes["error.type"] == "StepRefused"
    assert [span.name for span in spans if span.error] == ["book pay"]
    (process,) = [span for span in spans if span.kind == "consumer"]
    assert {
        "messaging.system": "kafka", "messaging.operation.name": "process", "messaging.operation.type": "process",
        "messaging.destination.name": topic, "messaging.consumer.group.name": "orders",
        "messaging.message.conversation_id": "c-1", "soma.event.type": "order.placed", "soma.tenant.id": "acme",
        "soma.delivery": "live", "messaging.kafka.offset": 0,
    }.items() <= process.attributes.items()  # fmt: skip

    # Each append was sent once, by the relay: as its child, or in a batch of several that is linked to it.
    for append in (span for span in spans if span.kind == "producer"):
        (send,) = [s for s in children(append, receiver) + receiver.linked_to(append) if s.name.startswith("send ")]
        assert (send.name, send.kind, send.service) == (f"send {topic}", "client", service)
        assert send.attributes["messaging.batch.message_count"] in (1, 2)

    # The replay is another trace, which is linked to where the event came from.
    (replay,) = [span for span in receiver.spans if span.name == "replay orders"]
    assert replay.trace_id != caller.trace_id
    assert tree(receiver.of(replay.trace_id)) == [
        "replay orders [internal, replay]",
        f"  process {topic} [consumer, replay]",
        "    start book [internal, replay]",
    ]
    (again,) = [span for span in receiver.of(replay.trace_id) if span.kind == "consumer"]
    (append,) = [span for span in spans if span.span_id == process.parent_id]
    assert again.links == ((append.trace_id, append.span_id),)
    assert again.attributes["soma.delivery"] == "replay"

    # What the events themselves carry: the same trace, with its state, and of the baggage what was let in.
    async with Soma(SomaConfig.from_env(env)) as soma:
        events = (await soma.store.query(tenant_id="acme")).events
    assert [event.event_type for event in events] == ["order.placed", "stock.reserved", "stock.released"]
    assert {event.trace_id for event in events} == {caller.trace_id}
    assert {event.trace.tracestate for event in events} == {"vendor=1"}
    assert {event.correlation_id for event in events} == {"c-1"}
    assert [event.baggage for event in events] == ["plan=gold", None, None]


def children(span: SentSpan, receiver: Collector) -> list[SentSpan]:
    return [each for each in receiver.of(span.trace_id) if each.parent_id == span.span_id]


def sent(receiver: Collector, caller: TraceContext) -> list[SentSpan]:
    """The appends of the trace that the relay has sent on."""
    appends = [span for span in receiver.of(caller.trace_id) if span.kind == "producer"]
    return [a for a in appends if any(s.kind == "client" and s.name.startswith("send ")
            for s in children(a, receiver) + receiver.linked_to(a))]  # fmt: skip
