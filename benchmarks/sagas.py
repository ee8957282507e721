"""Benchmark: sagas of three steps, beside the bare floor and DBOS; recovery, sleeping sagas, and latency.

``floor`` sends the statements that our worker sends, in a bare loop; ``least`` the least that leaves the same rows
(``sagas_floor.py`` says what they contain). ``DBOS`` calls workflows or takes them from a queue (``sagas_dbos.py`` says
how it is set). Every contender is a process of its own with 20 connections, on a database of its own of one server, and
begins its sagas while the clock runs; only what waits in the queue of DBOS was enqueued before. The clock stops when
the database says that the last one ended. Rates are medians of turns, in which the contenders alternate; ``share`` is
the median of the turns' ratios, and ``spread`` the smallest and the largest of them. ``times DBOS`` compares with the
faster of its two ways. ``CPU`` is that of the contender's process, without PostgreSQL's.

Run: ``python -m benchmarks.sagas [rates recovery sleeping latency]``; ``SOMA_BENCH_SAGAS`` says how many are started at
50 at once (1,500; the other counts follow from it), ``SOMA_BENCH_SLEEPING`` how many sleep (1,000,000).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from typing import Any, NamedTuple

import asyncpg
import psutil

from benchmarks import sagas_latency, sagas_recovery, sagas_sleeping
from benchmarks.reporting import report
from benchmarks.sagas_library import CONNECTIONS, EXTERNAL, TABLE, TRANSACTIONAL, process, start, until_ended
from soma_common.garbage import calm_collector
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.models import Saga
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.testing.lane.postgres import PostgresServer

SAGAS = int(os.environ.get("SOMA_BENCH_SAGAS", "1500"))
STEPS = 3
OURS = {1: SAGAS // 10, 50: SAGAS, 500: 2 * SAGAS}
"""How many sagas are measured, by how many there are at once."""
DBOS = {1: SAGAS // 60, 50: SAGAS // 8, 500: SAGAS // 3}
"""The same for DBOS, which is slower."""
TURNS, WARM = 3, 50
FORMS = ("threads", "coroutines")


@dataclass
class Bench:
    """A server with a database that has the tables, from which others are made."""

    server: PostgresServer
    _numbers: count[int] = field(default_factory=count)

    def database(self) -> str:
        """A new one with our tables."""
        return self.server.sql.create_database(f"sagas_{next(self._numbers)}", template="postgres")

    def empty(self) -> str:
        """A new one without them."""
        name = f"dbos_{next(self._numbers)}"
        dsn = self.server.sql.create_database(name, template="template1")
        self.server.sql.query(TABLE, database=name)
        return dsn

    def drop(self, dsn: str) -> None:
        """Away with one."""
        self.server.sql.drop_database(dsn.rpartition("/")[2])


class Measured(NamedTuple):
    """What a contender came to: steps per second, and µs of its process's CPU per step."""

    rate: float
    cpu: float

    @classmethod
    def of(cls, sagas: int, seconds: float, cpu: float) -> Measured:
        """So many sagas took so many seconds of time and of CPU."""
        return cls(sagas * STEPS / seconds, 1e6 * cpu / (sagas * STEPS))


Contender = Callable[[Bench, Saga, int], Awaitable[Measured]]


async def library(bench: Bench, saga: Saga, at_once: int) -> Measured:
    """Steps per second of our worker."""
    return await _worked(bench, saga, at_once, "sagas_library", at_once, 60)


async def floor(bench: Bench, saga: Saga, at_once: int) -> Measured:
    """Steps per second of the same statements."""
    return await _worked(bench, saga, at_once, "sagas_floor", "same", at_once)


async def least(bench: Bench, saga: Saga, at_once: int) -> Measured:
    """Steps per second of the fewest statements."""
    return await _worked(bench, saga, at_once, "sagas_floor", "least", at_once)


async def _worked(bench: Bench, saga: Saga, at_once: int, module: str, *arguments: object) -> Measured:
    dsn, sagas = bench.database(), OURS[at_once]
    async with Pool(PoolSettings(dsn, size=2)) as pool, process(module, dsn, saga.name, *arguments) as child:
        watching, orchestrator = await asyncpg.connect(dsn), SagaOrchestrator(pool)
        await start(orchestrator, saga, WARM)
        await until_ended(watching)
        begun, before = time.perf_counter(), _cpu(child.pid)
        await start(orchestrator, saga, sagas)
        await until_ended(watching)
        seconds, cpu = time.perf_counter() - begun, _cpu(child.pid) - before
        await watching.close()
    bench.drop(dsn)
    return Measured.of(sagas, seconds, cpu)


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def dbos(way: str) -> Contender:
    """Steps per second of DBOS: plain workflows, or a queue's; the faster form counts."""

    async def measure(bench: Bench, saga: Saga, at_once: int) -> Measured:
        return max([await _dbos(bench, saga, at_once, way, form) for form in FORMS])

    return measure


async def _dbos(bench: Bench, saga: Saga, at_once: int, way: str, form: str) -> Measured:
    dsn, sagas = bench.empty(), DBOS[at_once]
    async with process("sagas_dbos", dsn, saga.name, way, form, at_once, sagas, CONNECTIONS) as child:
        assert child.stdout is not None
        async with asyncio.timeout(120):
            seconds, cpu = json.loads(await child.stdout.readline())
    bench.drop(dsn)
    return Measured.of(sagas, seconds, cpu)


OTHERS: Mapping[str, Contender] = {"DBOS, called": dbos("plain"), "DBOS, queue": dbos("queue")}
CONTENDERS: Mapping[str, Contender] = {"floor": floor, "soma": library, "least": least, **OTHERS}


async def rates(bench: Bench) -> None:
    """Steps per second, of transactional and of external steps, at 1, 50 and 500 at once."""
    rows = []
    for saga in (TRANSACTIONAL, EXTERNAL):
        for at_once in OURS:
            rows += await _compared(bench, saga, at_once)
    print(
        f"  DBOS {version('dbos')}: a datasource at READ COMMITTED, {CONNECTIONS} + {CONNECTIONS} connections, a queue "
        "with worker_concurrency that is looked at every 5 ms, no logs; the faster of threads and coroutines"
    )
    title = f"Sagas of {STEPS} steps, median of {TURNS} turns (DBOS: one); spread: of the shares"
    report("sagas", title, rows)


async def _compared(bench: Bench, saga: Saga, at_once: int) -> list[dict[str, Any]]:
    turns: dict[str, list[Measured]] = {who: [] for who in CONTENDERS}
    for turn in range(TURNS):
        for who, contender in CONTENDERS.items():
            if turn == 0 or who not in OTHERS:
                turns[who].append(await contender(bench, saga, at_once))
                print(f"  {saga.name}, {at_once} at once, {who}: {turns[who][-1].rate:,.0f} steps/s", flush=True)
    best = max(turns[who][0].rate for who in OTHERS)
    return [_row(saga, at_once, who, measured, turns["floor"], best) for who, measured in turns.items()]


def _row(
    saga: Saga, at_once: int, who: str, measured: list[Measured], floors: list[Measured], best: float
) -> dict[str, Any]:
    shares = [100 * mine.rate / bare.rate for mine, bare in zip(measured, floors, strict=False)]
    rate = statistics.median(each.rate for each in measured)
    return {
        "steps": saga.name,
        "at once": at_once,
        "who": who,
        "steps/s": rate,
        "sagas/s": rate / STEPS,
        "share %": statistics.median(shares),
        "spread %": f"{min(shares):.0f}-{max(shares):.0f}",
        "times DBOS": rate / best,
        "CPU µs/step": statistics.median(each.cpu for each in measured),
    }


async def recovery(bench: Bench) -> None:
    """How long sagas of a worker that was killed lie still."""
    rows = [await sagas_recovery.measure(bench.database()) for _ in range(2)]
    title = f"SIGKILL of one of two workers with {sagas_recovery.SAGAS:,} sagas under way"
    report("sagas_recovery", title, rows)


async def sleeping(bench: Bench) -> None:
    """What sagas that sleep cost those that are due."""
    rows = []
    for what, sleepers, waiting in sagas_sleeping.VARIANTS:
        dsn = bench.database()
        rows.append(await sagas_sleeping.measure(dsn, what, sleepers, waiting))
        bench.drop(dsn)
    report("sagas_sleeping", "One claim beside sagas that sleep, median", rows)


async def latency(bench: Bench) -> None:
    """How soon a saga begins, on an idle system."""
    rows = await sagas_latency.measure(bench.database())
    report("sagas_latency", f"Start latency of {sagas_latency.SAMPLES} sagas, idle system, ms", rows)


PARTS: Mapping[str, Callable[[Bench], Awaitable[None]]] = {
    "rates": rates, "recovery": recovery, "sleeping": sleeping, "latency": latency,
}  # fmt: skip


async def main() -> None:
    """Measure everything, or the parts that are named, on one server."""
    with calm_collector(), PostgresServer.start(18) as server:
        await upgrade(server.dsn)
        bench = Bench(server)
        server.sql.query(TABLE)
        for name in sys.argv[1:] or PARTS:
            await PARTS[name](bench)


if __name__ == "__main__":
    asyncio.run(main())
