"""Part of the benchmark of sagas: what those that sleep cost a claim."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import asyncpg

from benchmarks.sagas_library import TRANSACTIONAL, start
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.store import SagaStore

SLEEPING: Final = int(os.environ.get("SOMA_BENCH_SLEEPING", "1000000"))
VARIANTS: Final = (("nobody", 0, 0), ("timers", SLEEPING, 0), ("timers and people", SLEEPING, SLEEPING // 2))
"""Name, how many sleep, and how many of these wait for people, so that nothing wakes them by itself."""
CALLS, DUE, ROUNDS, LEASE = 300, 100, 30, 60.0

_FILL: Final = """
INSERT INTO soma.sagas (saga_id, type_id, name, version, tenant_id, status, priority, length, epoch, wake_at, deadline,
                        input, correlation_id, traceparent, created_at)
SELECT uuidv7(), $1, $2, 1, 'bench', 'running', 3, 1, 1,
       CASE WHEN n % $3::bigint < $4::bigint THEN NULL ELSE now() + interval '30 days' + n * interval '1 ms' END,
       now() + interval '60 days', '{"number":1}', 'bench-' || n, '00-' || md5(n::text) || '-0000000000000001-01', now()
FROM generate_series(1, $3::bigint) AS n
"""
# The inner query of soma.claim_sagas, for EXPLAIN, which does not look into functions.
_INNER: Final = """
EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF)
SELECT d.saga_id FROM generate_series(1, 5) AS p (priority)
CROSS JOIN LATERAL (
    SELECT s.saga_id FROM soma.sagas s
    WHERE s.type_id = {type} AND s.priority = p.priority AND s.owner IS NULL AND s.wake_at <= statement_timestamp()
    ORDER BY s.wake_at LIMIT 100 FOR UPDATE SKIP LOCKED) AS d
LIMIT 100
"""
_DECISIVE: Final = re.compile(r"Index Scan|Seq Scan|Sort|Index Cond|Execution")


async def measure(dsn: str, what: str, sleepers: int, waiting: int) -> dict[str, Any]:
    """One row, in µs; the plans are printed."""
    async with Pool(PoolSettings(dsn, size=2)) as pool, pool.connection() as connection:
        await connection.execute(_FILL, TRANSACTIONAL.type_id, TRANSACTIONAL.name, sleepers, waiting, timeout=300)
        if sleepers:  # what was analyzed when it was empty is planned for as if it were for ever
            await connection.execute("VACUUM ANALYZE soma.sagas")
        orchestrator, store, rooms = SagaOrchestrator(pool), SagaStore(pool), {TRANSACTIONAL.type_id: DUE}

        async def take_over() -> Sequence[Any]:
            return await store.take_over([TRANSACTIONAL.type_id], DUE, lease=LEASE, patience=3)

        async def claim() -> Sequence[Any]:
            return await store.claim(rooms, lease=LEASE)

        row = {
            "asleep": what,
            "sagas": sleepers,
            "round trip": await _median(lambda: store.pool.fetch("SELECT 1"), CALLS, 1),
            "nothing due": await _median(claim, CALLS, 0),
            f"{DUE} due": await _with_due(orchestrator, claim),
            "take over, none": await _median(take_over, CALLS, 0),
        }
        await _explain(connection, f"{sleepers:,} asleep ({what}), nothing due")
        await start(orchestrator, TRANSACTIONAL, DUE)
        await _explain(connection, f"{sleepers:,} asleep ({what}), {DUE} due")
    return row


async def _with_due(orchestrator: SagaOrchestrator, claim: Callable[[], Awaitable[Sequence[Any]]]) -> float:
    """Each claim has so many that are due."""
    measured = []
    for _ in range(ROUNDS):
        await start(orchestrator, TRANSACTIONAL, DUE)
        measured.append(await _median(claim, 1, DUE))
    return statistics.median(measured)


async def _median(call: Callable[[], Awaitable[Sequence[Any]]], calls: int, found: int) -> float:
    """Microseconds of a call, which must find so many."""
    measured = []
    for _ in range(calls):
        begun = time.perf_counter()
        got = await call()
        measured.append(1e6 * (time.perf_counter() - begun))
        assert len(got) == found
    return statistics.median(measured)


async def _explain(connection: asyncpg.Connection[Any], title: str) -> None:
    """Print the lines of the plan that decide what it costs."""
    async with connection.transaction():
        plan = await connection.fetch(_INNER.format(type=TRANSACTIONAL.type_id))
    print(f"  The claim's inner query, {title}:")
    for line in plan:
        if _DECISIVE.search(line[0]):
            print(f"    {line[0].strip()}")
