"""Benchmark: what tracing costs, without a provider, with one that samples nothing, and with one that records all.

``removed`` is the library with its tracing calls taken out: spans, looks for a provider, and the context in which
handlers and steps run. ``none`` is the library as it is, in a program without a TracerProvider. ``off`` has the SDK of
OpenTelemetry with a sampler that drops everything, ``on`` one that records every span and gives it to an exporter that
throws it away.

Work: ``publish`` records events one by one in transactions of their own; ``consume`` lets a consumer of the log apply
them in batches, with a handler that does nothing; ``saga`` runs sagas of three steps that do nothing. Every measurement
is a process of its own on a database of its own; contenders alternate, and ratios are medians of turns, of CPU time of
our process per unit and (``rate``) of units per second, PostgreSQL's part included.

Run: ``python -m benchmarks.tracing``; ``SOMA_BENCH_TRACING`` says how many events (2,000), and
``SOMA_BENCH_TRACING_TURNS`` how many turns (5).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.reporting import report
from soma_common import Event, Saga, Soma, SomaConfig
from soma_common.garbage import calm_collector
from soma_common.postgres.migrate import upgrade
from soma_common.sagas.models import SagaStatus
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_TRACING", "2000"))
TURNS = int(os.environ.get("SOMA_BENCH_TRACING_TURNS", "5"))
CONTENDERS = ("removed", "none", "off", "on")
CONSUMED = 10  # events applied for each that is published one by one


async def nothing(number: int) -> None: ...


async def more(number: int) -> None: ...


async def last(number: int) -> None: ...


SAGA = Saga("three", int, nothing, more, last)


def event(number: int) -> Event:
    return Event(payload={"n": number}, event_type="a.b", aggregate_id=str(number), tenant_id="t")


async def publish(soma: Soma) -> int:
    """One event after the other."""
    for number in range(EVENTS):
        async with soma.transaction() as tx:
            tx.publish(event(number))
    return EVENTS


async def fill(soma: Soma) -> None:
    """What ``consume`` applies."""
    for start in range(0, EVENTS * CONSUMED, 1000):
        await soma.store.publish([event(number) for number in range(start, min(start + 1000, EVENTS * CONSUMED))])


async def consume(soma: Soma) -> int:
    """All of them."""
    await soma.drain("a", patience=600)
    return EVENTS * CONSUMED


async def saga(soma: Soma) -> int:
    """Sagas at once; steps."""
    count = EVENTS // 4
    ids = await asyncio.gather(*(soma.sagas.start_saga(SAGA, n, tenant_id="t") for n in range(count)))
    async with soma.saga_worker():
        for saga_id in ids:
            await soma.sagas.result(saga_id)
    assert (await soma.sagas.get_saga(ids[0])).status is SagaStatus.COMPLETED
    return count * 3


def take_out() -> None:
    """The library without its tracing calls."""
    from soma_common import wiring
    from soma_common.consumer import blocking, effects, spans
    from soma_common.sagas import attempts
    from soma_common.tracing.tracer import TransactionTracer

    class NoVariable:
        def set(self, _: object) -> None: ...

        def reset(self, _: object) -> None: ...

    nowhere: Any = nullcontext()
    for place, name, instead in (
        (effects, "AMBIENT", NoVariable()),
        (blocking, "AMBIENT", NoVariable()),
        (spans.HandlerSpans, "around", lambda *_: nowhere),
        (spans.HandlerSpans, "active", False),
        (attempts, "working_for", lambda _: nowhere),
        (TransactionTracer, "doing", lambda *_, **__: nowhere),
        (TransactionTracer, "current", lambda _: None),
        (TransactionTracer, "recorded", lambda _: None),
        (wiring, "StoreSpans", lambda _: None),
    ):
        setattr(place, name, instead)


@contextmanager
def provider(contender: str) -> Iterator[None]:
    """The application's provider."""
    if contender not in ("off", "on"):
        yield
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

    class Away(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    made = TracerProvider(sampler=ALWAYS_ON if contender == "on" else ALWAYS_OFF)
    made.add_span_processor(BatchSpanProcessor(Away(), max_queue_size=100_000))
    trace.set_tracer_provider(made)
    yield
    made.shutdown()


async def measured(dsn: str, work: str) -> dict[str, float]:
    """CPU µs per unit, and units per second."""
    await upgrade(dsn)
    soma = Soma(SomaConfig(postgres_dsn=dsn, service_id="bench"), sagas=[SAGA])

    @soma.handler("a.b", consumer="a")
    async def handle(event: Any, ctx: Any) -> None: ...

    async with soma:
        if work == "consume":
            await fill(soma)
        await soma.pool.fetch("SELECT 1")
        began, cpu = time.perf_counter(), time.process_time()
        with calm_collector():
            units = await {"publish": publish, "consume": consume, "saga": saga}[work](soma)
        took, burnt = time.perf_counter() - began, time.process_time() - cpu
    return {"cpu": burnt / units * 1e6, "rate": units / took}


def once(server: PostgresServer, number: int, work: str, contender: str) -> dict[str, float]:
    """One measurement, in a process of its own."""
    name = f"tracing_{number}"
    dsn = server.sql.create_database(name)
    command = [sys.executable, "-m", "benchmarks.tracing", work, contender, dsn]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    server.sql.drop_database(name)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """All works by all contenders."""
    results: list[dict[str, Any]] = []
    number = 0
    with PostgresServer.start(18) as server:
        for work in ("publish", "consume", "saga"):
            turns: list[dict[str, dict[str, float]]] = []
            for _ in range(TURNS):
                turn = {}
                for contender in CONTENDERS:
                    number += 1
                    turn[contender] = once(server, number, work, contender)
                turns.append(turn)
            for contender in CONTENDERS:
                cpu = [turn[contender]["cpu"] / turn["removed"]["cpu"] for turn in turns]
                rate = [turn[contender]["rate"] / turn["removed"]["rate"] for turn in turns]
                row = {
                    "work": work, "tracing": contender,
                    "cpu_us": round(statistics.median(turn[contender]["cpu"] for turn in turns), 1),
                    "cpu_ratio": round(statistics.median(cpu), 3),
                    "cpu_spread": f"{min(cpu):.2f}-{max(cpu):.2f}",
                    "per_second": round(statistics.median(turn[contender]["rate"] for turn in turns)),
                    "rate_ratio": round(statistics.median(rate), 3),
                }  # fmt: skip
                results.append(row)
    report("tracing", "What tracing costs", results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chosen, who, address = sys.argv[1:]
        if who == "removed":
            take_out()
        with provider(who):
            print(json.dumps(asyncio.run(measured(address, chosen))))
    else:
        main()
