"""Part of the benchmark of sagas: one of two workers is killed, and the other takes over what it had."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import asyncpg

from benchmarks.sagas_library import NAPS, SLOW, process, start, until_ended
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.orchestrator import SagaOrchestrator

SAGAS: Final = 1000  # half of them at each worker
LEASE: Final = 5.0  # seconds
_OWNED: Final = "SELECT count(*), min(owner::text) FROM soma.sagas WHERE owner IS NOT NULL"
_STILL: Final = "SELECT count(*) FROM soma.sagas WHERE owner = $1::text::uuid"
_DONE: Final = "SELECT count(*) FROM soma.saga_steps WHERE what = 'done'"


async def measure(dsn: str) -> dict[str, Any]:
    """One row: seconds from the kill until every saga of the dead worker had been claimed, and until all had ended."""
    half = SAGAS // 2
    async with Pool(PoolSettings(dsn, size=2)) as pool, process("sagas_library", dsn, SLOW.name, half, LEASE) as first:
        watching, orchestrator = await asyncpg.connect(dsn), SagaOrchestrator(pool)
        await start(orchestrator, SLOW, half)
        dead = await _until_owned(watching, half)  # the first worker is full: the second gets the rest
        async with process("sagas_library", dsn, SLOW.name, SAGAS, LEASE):
            await start(orchestrator, SLOW, half)
            await _until_owned(watching, SAGAS)
            held = await watching.fetchval(_STILL, dead)
            killed = time.perf_counter()
            first.kill()
            while await watching.fetchval(_STILL, dead):
                await asyncio.sleep(0.01)
            claimed = time.perf_counter() - killed
            await until_ended(watching)
            ended = time.perf_counter() - killed
        done = await watching.fetchval(_DONE)
        await watching.close()
    assert done == SAGAS * NAPS
    return {
        "sagas": SAGAS,
        "of the dead": held,
        "lease s": LEASE,
        "all claimed s": claimed,
        "times lease": claimed / LEASE,
        "all ended s": ended,
    }


async def _until_owned(connection: asyncpg.Connection[Any], wanted: int) -> str:
    """Until so many have owners; one of these."""
    async with asyncio.timeout(60):
        while True:
            owned, owner = await connection.fetchrow(_OWNED)
            if owned >= wanted:
                return str(owner)
            await asyncio.sleep(0.01)
