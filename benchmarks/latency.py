"""From publish to effect: milliseconds between an event's creation and the commit of its effect, by rate and mode.

Publisher, relay and consumer are processes of their own on one machine; both ends read the same wall clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reporting import percentile, report
from soma_common import Event, Payload, PayloadModels, Soma
from soma_common.consumer.positions import Positions
from soma_common.consumer.source import Record
from soma_common.postgres.migrate import upgrade
from soma_common.service import run_until_signalled
from soma_common.testing.run import ServerRun
from soma_common.wiring import make_relay

RATES = (100, 1000, 5000)
TABLE = "CREATE TABLE IF NOT EXISTS seen (event_id uuid PRIMARY KEY)"


class Ping(Payload, event_type="bench.ping"):
    """What is published."""

    number: int
    filling: str = "x" * 200


def application(env: Mapping[str, str] | None = None) -> Soma:
    """Publisher and consumer; the handler's effect is one row."""
    soma = Soma.from_env(service_id="latency", models=PayloadModels(Ping), env=env)

    @soma.handler(Ping, consumer="pong")
    async def pong(event: Any, ctx: Any) -> None:
        await ctx.tx.execute("INSERT INTO seen VALUES ($1)", event.event_id)

    return soma


async def consume(results: Path) -> None:
    """Consume until SIGTERM, noting the delay of each event when its transaction has committed."""
    delays: list[float] = []
    async with application() as soma:
        committed = Positions.settle

        def noting(positions: Positions, records: Iterable[Record]) -> None:
            now, events = time.time(), [record.event for record in records if record.event is not None]
            delays.extend(now - event.occurred_at.timestamp() for event in events if event.event_type == "bench.ping")
            results.with_suffix(".count").write_text(str(len(delays)))
            committed(positions, records)

        Positions.settle = noting  # type: ignore[method-assign,assignment]  # the benchmark's own measuring point
        await run_until_signalled(soma.consumer("pong"))
    results.write_text(json.dumps(delays))


async def relay() -> None:
    """Relay until SIGTERM."""
    async with application() as soma, AsyncExitStack() as closing:
        await run_until_signalled(make_relay(soma.config, soma.pool, closing))


def ping(number: int) -> Event:
    """An event; there are 997 keys."""
    return Event(payload=Ping(number=number), tenant_id="t", aggregate_id=str(number % 997))


async def publish(soma: Soma, rate: int, seconds: float) -> int:
    """Publish at a steady rate; each millisecond what is due goes out as one batch per 1,000 events/s."""
    start, sent, running = time.perf_counter(), 0, set()
    while (elapsed := time.perf_counter() - start) < seconds:
        due = int(elapsed * rate) - sent
        if due:
            events = [
                Event(payload=Ping(number=sent + n), tenant_id="t", aggregate_id=str((sent + n) % 997))
                for n in range(due)
            ]
            task = asyncio.create_task(soma.publish(events))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += due
        await asyncio.sleep(0.001)
    await asyncio.gather(*running)
    return sent


async def measure(env: dict[str, str], rate: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    results = folder / f"{rate}.json"
    roles = ["consume"] if env["SOMA_DEPLOY_MODE"] == "standalone" else ["consume", "relay"]
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.latency", "--role", role, "--results", str(results), env=env
        )
        for role in roles
    ]
    try:
        async with application(env) as soma:
            await soma.pool.fetch(TABLE)
            warm = await publish(soma, 50, 1)
            await until_counted(results, warm)
            before = warm
            sent = await publish(soma, rate, seconds)
            await until_counted(results, before + sent)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            await child.wait()
    delays = json.loads(results.read_text())[before:]
    return {
        "mode": env["SOMA_DEPLOY_MODE"],
        "events/s": rate,
        "events": sent,
        "p50 ms": percentile(delays, 0.5) * 1000,
        "p99 ms": percentile(delays, 0.99) * 1000,
        "max ms": max(delays) * 1000,
    }


async def until_counted(results: Path, number: int) -> None:
    """Until the consumer has seen so many events."""
    count = results.with_suffix(".count")
    async with asyncio.timeout(120):
        while not count.exists() or int(count.read_text() or 0) < number:
            await asyncio.sleep(0.02)


@contextmanager
def environments(folder: Path) -> Iterator[list[dict[str, str]]]:
    """The two modes; servers of the second one run meanwhile."""
    run = ServerRun(os.environ, lasting=True)
    try:
        dsn = run.postgres().sql.create_database("latency")
        asyncio.run(upgrade(dsn))
        kafka = {"SOMASTACK_POSTGRES_DSN": dsn, "SOMASTACK_KAFKA_BOOTSTRAP": run.kafka().bootstrap}
        common = {**os.environ, "SOMA_FOLDER": str(folder / "db")}
        yield [
            {**common, "SOMA_DEPLOY_MODE": "standalone"},
            {**common, "SOMA_DEPLOY_MODE": "somastack", **kafka},
        ]
    finally:
        run.close()


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("consume", "relay"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rates", type=int, nargs="*", default=RATES)
    arguments = parser.parse_args()
    if arguments.role == "consume":
        return asyncio.run(consume(arguments.results))
    if arguments.role == "relay":
        return asyncio.run(relay())
    with tempfile.TemporaryDirectory() as text, environments(Path(text)) as modes:
        rows = [
            asyncio.run(measure(env, rate, arguments.seconds, Path(tempfile.mkdtemp(dir=text))))
            for env in modes
            for rate in arguments.rates
        ]
    report("latency", "Publish to effect, three processes on one machine", rows)
    return None


if __name__ == "__main__":
    main()
