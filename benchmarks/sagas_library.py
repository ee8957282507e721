"""The sagas of the benchmark, and a process that runs them: a :class:`SagaWorker` as an application has it."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.models import Saga, SagaStep, Tx
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.starting import begin
from soma_common.sagas.worker import SagaWorker
from soma_common.service import run_until_signalled

CONNECTIONS: Final = 20  # for each contender alike
NAP: Final = 1.5  # seconds
NAPS: Final = 6
STAMPERS: Final = 4
TABLE: Final = "CREATE TABLE effect (saga bigint NOT NULL, step integer NOT NULL)"
INSERT: Final = "INSERT INTO effect (saga, step) VALUES ($1, $2)"
_START: Final = 500  # sagas of a statement
_LEFT: Final = "SELECT EXISTS (SELECT FROM soma.sagas WHERE status NOT IN ('completed', 'compensated'))"


@dataclass(frozen=True, slots=True)
class Order:
    """What a saga is started with."""

    number: int


async def reserve(order: Order, tx: Tx) -> None:
    """A transactional step."""
    await tx.conn.execute(INSERT, order.number, 1)


async def pay(order: Order, tx: Tx) -> None:
    """A transactional step."""
    await tx.conn.execute(INSERT, order.number, 2)


async def ship(order: Order, tx: Tx) -> None:
    """A transactional step."""
    await tx.conn.execute(INSERT, order.number, 3)


async def ask_stock(order: Order) -> str:
    """An external step that takes no time."""
    return f"receipt {order.number}-1"


async def ask_bank(order: Order) -> str:
    """An external step that takes no time."""
    return f"receipt {order.number}-2"


async def ask_carrier(order: Order) -> str:
    """An external step that takes no time."""
    return f"receipt {order.number}-3"


async def nap(order: Order) -> None:
    """An external step that takes its time."""
    await asyncio.sleep(NAP)


async def stamp(order: Order) -> float:
    """The time at which a step was called."""
    return time.time()


TRANSACTIONAL: Final = Saga("transactional", Order, reserve, pay, ship)
EXTERNAL: Final = Saga("external", Order, ask_stock, ask_bank, ask_carrier)
SLOW: Final = Saga("slow", Order, *(SagaStep(nap, name=f"nap-{n}") for n in range(NAPS)))
STAMPS: Final = tuple(Saga(f"stamp-{n}", Order, stamp) for n in range(STAMPERS))
SAGAS: Final[Mapping[str, Saga]] = {saga.name: saga for saga in (TRANSACTIONAL, EXTERNAL, SLOW, *STAMPS)}


async def start(orchestrator: SagaOrchestrator, saga: Saga, count: int) -> None:
    """Begin so many sagas."""
    for first in range(0, count, _START):
        numbers = range(first, min(first + _START, count))
        await orchestrator.start_sagas([begin(saga, Order(n), tenant_id="bench") for n in numbers])


async def until_ended(connection: asyncpg.Connection[Any]) -> None:
    """Until the database has no saga that has not ended."""
    async with asyncio.timeout(120):
        while await connection.fetchval(_LEFT):
            await asyncio.sleep(0.01)


def worker(pool: Pool, saga: Saga, settings: SagaSettings) -> SagaWorker:
    """A worker of one definition, whose steps publish nothing."""

    async def append(events: Sequence[Any], tx: Any) -> None:
        raise AssertionError

    return SagaWorker(pool, [saga], append=append, settings=settings)


@asynccontextmanager
async def process(module: str, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of the benchmark that has said that it is ready; it is ended at the end."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        yield child
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


async def _run(dsn: str, name: str, at_once: int, lease: float) -> None:
    async with Pool(PoolSettings(dsn, size=CONNECTIONS)) as pool:
        running = worker(pool, SAGAS[name], SagaSettings(at_once=at_once, lease=lease))
        print("ready", flush=True)
        await run_until_signalled(running)


def main() -> None:
    """Run a worker until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dsn")
    parser.add_argument("name", choices=SAGAS)
    parser.add_argument("at_once", type=int)
    parser.add_argument("lease", type=float)
    given = parser.parse_args()
    asyncio.run(_run(given.dsn, given.name, given.at_once, given.lease))


if __name__ == "__main__":
    main()
