"""Part of the benchmark of sagas: how soon one begins on an idle system.

From the return of ``start_saga`` to the call of the function of the first step; both ends read the same wall clock.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any, Final

from benchmarks.reporting import percentile
from benchmarks.sagas_library import STAMPERS, STAMPS, Order, process, worker
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.models import Saga
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.settings import SagaSettings

SAMPLES: Final = 300
SETTINGS: Final = SagaSettings()
_REST: Final = 0.35  # seconds, in which a worker falls back to its longest pause between two looks
_BREATH: Final = 0.05  # seconds, where the worker is woken, and its pauses do not matter


async def measure(dsn: str) -> list[dict[str, Any]]:
    """The rows."""
    async with Pool(PoolSettings(dsn, size=10)) as pool:
        running = worker(pool, STAMPS[0], SETTINGS)
        async with running:
            near = SagaOrchestrator(pool, STAMPS, woken=running.wake)
            starts, same = await _sampled(near, STAMPS[0], SAMPLES, _BREATH)
            await near.close()
        async with AsyncExitStack() as stack:
            for saga in STAMPS:  # several, each with sagas of its own, so that each has time to fall idle
                await stack.enter_async_context(process("sagas_library", dsn, saga.name, 100, SETTINGS.lease))
            far = SagaOrchestrator(pool, STAMPS)
            await asyncio.sleep(1)
            sampled = await asyncio.gather(*(_sampled(far, saga, SAMPLES // STAMPERS, _REST) for saga in STAMPS))
            await far.close()
    other = [latency for _, latencies in sampled for latency in latencies]
    return [
        _row("start_saga itself", starts),
        _row("to the first step, worker in the same process", same),
        _row("to the first step, worker in another process", other),
    ]


async def _sampled(
    orchestrator: SagaOrchestrator, saga: Saga, samples: int, rest: float
) -> tuple[list[float], list[float]]:
    """Seconds of each start, and from its return to the first step."""
    starts, begins = [], []
    await orchestrator.result(await orchestrator.start_saga(saga, Order(0), tenant_id="bench"))
    for number in range(samples):
        await asyncio.sleep(rest * (1 + number % 10 / 20))  # in no step with the pauses of the worker
        begun = time.perf_counter()
        saga_id = await orchestrator.start_saga(saga, Order(number), tenant_id="bench")
        starts.append(time.perf_counter() - begun)
        returned = time.time()
        begins.append(await orchestrator.result(saga_id) - returned)
    return starts, begins


def _row(what: str, seconds: list[float]) -> dict[str, Any]:
    return {
        "what": what,
        "p50 ms": 1000 * percentile(seconds, 0.5),
        "p99 ms": 1000 * percentile(seconds, 0.99),
        "max ms": 1000 * max(seconds),
    }
