"""The tracer: with a provider of the application's, with one that samples nothing, and with none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import NonRecordingSpan

from soma_common.ambient import AMBIENT, Ambient, current_correlation_id, current_tenant, working_for
from soma_common.errors import ConfigurationError, MissingDependency
from soma_common.events.models import Event
from soma_common.service import Service
from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import Doing, settling
from soma_common.tracing.setup import configure_tracing
from soma_common.tracing.tracer import TransactionTracer, kinship
from tests.core_support import recorded
from tests.span_support import Spans, is_child, linked, provider_of_the_application

FIRST, SECOND = TraceContext("1" * 32, "2" * 16, 1, "a=1"), TraceContext("3" * 32, "4" * 16)


@pytest.fixture
def spans() -> Iterator[Spans]:
    with provider_of_the_application() as spans:
        yield spans


def asked() -> dict[str, Any]:
    raise AssertionError("nobody records it")


def test_without_a_provider_nothing_is_made_and_the_trace_travels() -> None:
    tracer = TransactionTracer()
    assert not tracer.active
    with tracer.doing(Doing("a", "internal", {}, asked), parent=FIRST) as context:
        assert context == FIRST == tracer.current()
        with tracer.span("b") as inner:
            assert inner == FIRST
        with tracer.span("c", parent=SECOND) as other:
            assert other == SECOND
        assert tracer.current() == FIRST
        assert tracer.recorded() is None
    assert tracer.current() is None
    with tracer.span("d") as nothing:
        assert nothing is None
    with pytest.raises(RuntimeError):
        tracer.begin(settling("a", None, 1))


def test_without_a_provider_somebody_else_s_context_is_gone_on_with() -> None:
    tracer = TransactionTracer()
    with provider_of_the_application(), tracer.span("theirs") as theirs:
        assert theirs is not None
        context = trace.get_current_span().get_span_context()
    with trace.use_span(NonRecordingSpan(context)):
        assert tracer.current() == theirs
        with tracer.span("a", parent=FIRST):
            assert tracer.current() == FIRST
        assert tracer.current() == theirs


def test_a_provider_may_come_later_and_is_never_replaced(spans: Spans) -> None:
    provider = trace.get_tracer_provider()
    tracer = TransactionTracer()
    assert tracer.active
    found = configure_tracing(service="x", endpoint="http://127.0.0.1:1")
    assert (found.provider, found.installed) == (provider, False)
    found.shutdown()
    with tracer.span("still recorded"):
        pass
    assert spans.names() == ["still recorded"]
    assert trace.get_tracer_provider() is provider


def test_parents_links_and_errors(spans: Spans) -> None:
    tracer = TransactionTracer()
    with tracer.span("outer") as outer, tracer.span("child", parent=FIRST, kind="consumer") as child:
        assert (child and child.trace_id, child and child.tracestate) == (FIRST.trace_id, "a=1")
        with tracer.doing(Doing("root", "internal", {}), root=True, links=[FIRST, SECOND]):
            assert tracer.current() != child
    with pytest.raises(ValueError, match="mine"), tracer.span("failed"):
        raise ValueError("mine")
    with pytest.raises(asyncio.CancelledError), tracer.span("cancelled"):
        raise asyncio.CancelledError
    assert outer is not None
    assert not is_child(spans.one("child"), spans.one("outer"))
    assert spans.one("child").kind.name == "CONSUMER"
    assert spans.one("root").parent is None
    assert linked(spans.one("root")) == {int(FIRST.span_id, 16), int(SECOND.span_id, 16)}
    failed = spans.one("failed")
    assert (failed.attributes or {})["error.type"] == "ValueError"
    assert failed.status.description == "ValueError: mine"
    assert [event.name for event in failed.events] == ["exception"]
    assert spans.one("cancelled").status.status_code.name == "ERROR"


def test_one_context_is_a_parent_and_several_are_links() -> None:
    assert kinship([FIRST, FIRST]) == {"parent": FIRST}
    assert kinship([FIRST, SECOND, FIRST]) == {"root": True, "links": [FIRST, SECOND]}
    many = [TraceContext.new() for _ in range(500)]
    assert kinship(many)["links"] == many[:128]


def test_what_is_not_sampled_is_not_asked_for_its_attributes() -> None:
    with provider_of_the_application(sampler=ParentBased(ALWAYS_OFF)) as spans:
        tracer = TransactionTracer()
        with tracer.doing(Doing("a", "internal", {}, asked)) as context:
            assert context is not None
            assert context.flags & 1 == 0
        with tracer.doing(Doing("b", "internal", {}), parent=FIRST):
            pass
    assert spans.names() == ["b"]  # its caller samples it


async def test_tasks_and_threads_inherit_and_never_give_back(spans: Spans) -> None:
    tracer, seen = TransactionTracer(), []

    async def inside(number: int) -> None:
        with working_for(Ambient(f"t{number}", f"c{number}")), tracer.span(f"s{number}") as mine:
            for _ in range(5):
                await asyncio.sleep(0)
                assert (current_tenant(), current_correlation_id()) == (f"t{number}", f"c{number}")
                assert tracer.current() == mine
                assert Event(payload={}, event_type="a.b", aggregate_id="1").tenant_id == f"t{number}"

    def look() -> None:
        seen.append((AMBIENT.get(), tracer.current()))

    with working_for(Ambient("outer")):
        await asyncio.gather(*map(inside, range(50)))
        await asyncio.to_thread(look)  # a copy of our context
        thread = threading.Thread(target=look)  # a context of its own
        thread.start()
        thread.join()
        await asyncio.get_running_loop().run_in_executor(None, look)  # the pool's: nothing of to_thread stayed there
    assert seen == [(Ambient("outer"), None), (None, None), (None, None)]
    assert (AMBIENT.get(), tracer.current()) == (None, None)


@pytest.mark.parametrize("with_provider", [True, False])
async def test_a_service_that_a_request_starts_is_none_of_its_work(with_provider: bool) -> None:
    seen = []

    class Looking(Service):
        async def run(self) -> None:
            seen.append((AMBIENT.get(), TransactionTracer().current()))
            await self.stopping.wait()

    tracer = TransactionTracer()
    with working_for(Ambient("acme", "c", FIRST)):
        if with_provider:
            with provider_of_the_application(), tracer.span("request"):
                async with Looking("a"):
                    await asyncio.sleep(0)
        else:
            async with Looking("a"):
                await asyncio.sleep(0)
    assert seen == [(None, None)]


def test_a_recorded_event_stands_for_its_work() -> None:
    with working_for(recorded({}, trace=FIRST, baggage="plan=gold")):
        assert (current_tenant(), current_correlation_id(), TransactionTracer().current()) == ("t", "c", FIRST)
        made = Event(payload={}, event_type="a.b", aggregate_id="1")
        mine = Event(payload={}, event_type="a.b", aggregate_id="1", tenant_id="x", correlation_id="y", baggage="z=1")
    assert (made.tenant_id, made.correlation_id, made.baggage) == ("t", "c", "plan=gold")
    assert (mine.tenant_id, mine.correlation_id, mine.baggage) == ("x", "y", "z=1")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"endpoint": "ftp://x"}, "not a web address"), ({"endpoint": "http://x:99999"}, "not a web address"),
     ({"endpoint": ""}, "No collector is named"), ({"sample_ratio": 2.0, "endpoint": "http://x"}, "sample_ratio"),
     ({"queue": 0, "endpoint": "http://x"}, "queue")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SOMASTACK_JAEGER_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=said):
        configure_tracing(service="x", **options)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependency, match="opentelemetry") as error:
        configure_tracing(service="x", endpoint="http://127.0.0.1:1")
    assert "soma-common[otlp]" in str(error.value.cure)


PROGRAM = """
import sys
from soma_common import TransactionTracer, configure_tracing
first = configure_tracing(service="x", endpoint="http://127.0.0.1:9", queue=10, timeout=0.2)
again = configure_tracing(service="y", endpoint="http://127.0.0.1:9")
assert first.installed and again.installed and first.provider is again.provider
for _ in range(1000):
    with TransactionTracer().span("a"):
        pass
first.shutdown()
first.shutdown()
print("ended")
"""


def test_a_collector_that_is_away_holds_nothing_up() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr
