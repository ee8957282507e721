"""Benchmark: the console before a million events and a hundred thousand dead letters.

Time to the first byte of each page, over loopback from a console in a process of its own, one person and eight at once;
and the plan of every statement that the pages send, kept in ``benchmarks/results/console_plans.txt``: no page may read
a large table from its beginning to its end.

Run: ``python -m benchmarks.console``; ``SOMA_BENCH_EVENTS`` and ``SOMA_BENCH_LETTERS`` change the sizes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.reporting import RESULTS, percentile, report
from soma_common.config import SomaConfig
from soma_common.console.backend import open_backend
from soma_common.console.serving import make_console
from soma_common.console.settings import ConsoleSettings
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_EVENTS", "1000000"))
LETTERS = int(os.environ.get("SOMA_BENCH_LETTERS", "100000"))
SAGAS = LETTERS // 5
ROUNDS = 40
LARGE = ("events", "dead_letters", "dead_letter_history", "sagas", "saga_steps", "inbox", "streams")
_FEW = 500  # rows: a list of the newest may read so many
_SCAN = r"Seq Scan on (?:soma\.)?(\w+)[^\n]*actual rows=([\d.]+)[^\n]*((?:\n(?!.*->)[^\n]*)*)"
FILL = Path(__file__).with_suffix(".sql").read_text()


async def fill(pool: Pool, *, events: int, letters: int, sagas: int) -> None:
    """Rows as years would leave them."""
    async with pool.connection() as connection:
        for statement in FILL.format(events=events, letters=letters, sagas=sagas).split(";\n"):
            if statement.strip():
                await connection.execute(statement)
        await connection.execute("VACUUM ANALYZE")


async def pages(pool: Pool) -> dict[str, str]:
    """The pages that are measured, by name."""
    (event,) = await pool.fetch(
        "SELECT event_id, trace_id, correlation_id, aggregate_id FROM soma.events WHERE position = 5000"
    )
    (letter,) = await pool.fetch("SELECT letter_id FROM soma.dead_letters WHERE status = 'dead' LIMIT 1")
    (saga,) = await pool.fetch("SELECT saga_id FROM soma.sagas WHERE status = 'stuck' LIMIT 1")
    return {
        "overview": "/", "overview, one tenant": "/?tenant=tenant-3", "events": "/events",
        "events, deep": "/events?cursor=3000",
        "events, one tenant": "/events?tenant=tenant-3",
        "events, type and time": "/events?event_type=order.paid&since=2020-01-01", "event": f"/events/{event[0]}",
        "stream": f"/stream?tenant=tenant-0&aggregate_type=order&aggregate_id={event[3]}",
        "trace": f"/traces/{event[1].hex}", "correlation": f"/correlation?id={event[2]}", "letters": "/letters",
        "letters, one tenant": "/letters?tenant=tenant-3", "letters found": "/letters/found",
        "letters, one kind": "/letters/found?fingerprint=print-7&consumer=consumer-8",
        "letters, deep": "/letters/found?cursor=30000", "letters, tenant": "/letters/found?tenant=tenant-3&status=dead",
        "letter": f"/letters/{letter[0]}", "re-drive, dry run": "/redrive",
        "re-drive, one kind": "/redrive?fingerprint=print-7", "sagas": "/sagas",
        "sagas, one tenant": "/sagas?tenant=tenant-3", "saga": f"/sagas/{saga[0]}", "replays": "/replays",
        "consumers": "/readers",
    }  # fmt: skip


class Statements(Pool):
    """A pool that keeps what it is asked."""

    asked: dict[str, Sequence[Any]]

    async def fetch(self, sql: str, *args: Any) -> list[Any]:
        """Keep it, and ask."""
        self.asked.setdefault(sql, args)
        return await super().fetch(sql, *args)

    async def fetch_planned(self, sql: str, *args: Any) -> list[Any]:
        """Keep it, and ask."""
        self.asked.setdefault(sql, args)
        return await super().fetch_planned(sql, *args)


async def plans(config: SomaConfig, wanted: Mapping[str, str]) -> dict[str, list[str]]:
    """The plan of every statement that these pages send, by page."""
    found: dict[str, list[str]] = {}
    async with open_backend(config, config.postgres_dsn, ConsoleSettings(query_timeout=120)) as backend:
        watched = Statements(backend.pool.settings)
        object.__setattr__(backend, "pool", watched)
        _, app = make_console(ConsoleSettings(query_timeout=120), backend)
        transport = httpx.ASGITransport(app)
        async with watched, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8790") as http:
            for name, path in wanted.items():
                watched.asked = {}
                answer = await http.get(path)
                assert answer.status_code == 200, (name, answer.status_code, answer.text[-500:])
                found[name] = [await _plan(backend.slow, sql, args) for sql, args in watched.asked.items()]
    return found


async def _plan(pool: Pool, sql: str, args: Sequence[Any]) -> str:
    rows = await pool.fetch(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}", *args)
    return sql.strip() + "\n" + "\n".join(f"    {row[0]}" for row in rows)


def whole_scans(plan: str) -> list[str]:
    """Large tables that a plan reads from beginning to end; what it reads of an empty partition is nothing."""
    found = []
    for table, rows, more in re.findall(_SCAN, plan):
        removed = re.search(r"Rows Removed by Filter: (\d+)", more)
        read = float(rows) + (float(removed[1]) if removed else 0)
        if read > _FEW and re.sub(r"_p\d+$", "", table) in LARGE:
            found.append(table)
    return found


@contextmanager
def served(dsn: str) -> Iterator[str]:
    """A console in a process of its own; its address."""
    command = [sys.executable, "-m", "soma_common.cli.main", "console", "--port", "0"]
    process = subprocess.Popen(
        command, env=os.environ | {"SOMASTACK_POSTGRES_DSN": dsn}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1].rstrip("/")
    finally:
        process.terminate()
        process.wait()


async def _first_bytes(http: httpx.AsyncClient, path: str, rounds: int) -> list[float]:
    """Milliseconds to the first byte."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        async with http.stream("GET", path) as answer:
            times.append((time.perf_counter() - began) * 1000)
            assert answer.status_code == 200, (path, answer.status_code)
            await answer.aread()
    return times


async def _measure(url: str, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for name, path in wanted.items():
            cold = (await _first_bytes(http, path, 1))[0]
            alone = await _first_bytes(http, path, ROUNDS)
            several = await asyncio.gather(*(_first_bytes(http, path, ROUNDS // 4) for _ in range(8)))
            crowd = [each for times in several for each in times]
            rows.append({
                "page": name, "first ms": cold, "p50 ms": percentile(alone, 0.5), "p99 ms": percentile(alone, 0.99),
                "8 at once: p50": percentile(crowd, 0.5), "p99": percentile(crowd, 0.99),
            })  # fmt: skip
    return rows


async def main() -> None:
    """Fill, look at plans, measure."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer.start(18))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn, size=2)) as pool:
            began = time.perf_counter()
            await fill(pool, events=EVENTS, letters=LETTERS, sagas=SAGAS)
            print(f"filled in {time.perf_counter() - began:.0f} s", flush=True)
            wanted = await pages(pool)
        found = await plans(SomaConfig(postgres_dsn=server.dsn), wanted)
        RESULTS.mkdir(exist_ok=True)
        text = "\n".join(f"== {name} ==\n" + "\n\n".join(each) + "\n" for name, each in found.items())
        (RESULTS / "console_plans.txt").write_text(text)
        bad = {
            name: scans for name, each in found.items() if (scans := [s for plan in each for s in whole_scans(plan)])
        }
        print("large tables read from beginning to end:", json.dumps(bad) if bad else "none", flush=True)
        with served(server.dsn) as url:
            rows = await _measure(url, wanted)
    report("console", f"{EVENTS:,} events, {LETTERS:,} letters, {SAGAS:,} sagas: time to the first byte", rows)


if __name__ == "__main__":
    asyncio.run(main())
