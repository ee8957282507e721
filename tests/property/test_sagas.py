"""REQUIREMENTS 23.2 and 23.3 on a real database: whatever a saga is made of, whatever fails in it, and whenever its
workers are killed, it ends where it must, and is undone in exactly the reverse order."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Sequence
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soma_common.sagas.models import Saga
from tests.saga_process import WorkerProcess
from tests.saga_specs import TABLE, Plan, build, check, effects_of, specs
from tests.saga_support import ENDS, TENANT, Sagas, opened
from tests.waiting import until

_QUIETLY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
_NUMBERS = iter(range(10**9))


async def _started(sagas: Sagas, drawn: Sequence[Any], dsn: str, each: int) -> list[tuple[UUID, Saga, Any]]:
    """Sagas of the drawn definitions, so many of each."""
    made = [(build(f"drawn-{next(_NUMBERS)}", spec), spec) for spec in drawn]
    return [(await sagas.start(saga, Plan(dsn)), saga, spec) for saga, spec in made for _ in range(each)]


async def _check(sagas: Sagas, started: Sequence[tuple[UUID, Saga, Any]], *, killed: bool) -> None:
    for saga_id, _, spec in started:
        view = await sagas.orchestrator.get_saga(saga_id)
        async with sagas.pool.connection() as connection:
            effects = await effects_of(connection, saga_id)
        try:
            check(spec, view, effects, killed=killed)
        except AssertionError as error:
            lines = "\n".join(f"{e.number} {e.what} {e.step} {e.error or ''}" for e in view.journal)
            raise AssertionError(f"{error}\n{json.dumps(spec)}\n{view.status}\n{lines}\n{effects}") from error


async def _all_ended(sagas: Sagas, ids: set[UUID]) -> bool:
    rows = await sagas.pool.fetch("SELECT status FROM soma.sagas WHERE saga_id = ANY ($1::uuid[])", list(ids))
    return all(row[0] in ENDS for row in rows)


@settings(max_examples=60, deadline=None, suppress_health_check=_QUIETLY)
@given(drawn=st.lists(specs(), min_size=1, max_size=4))
def test_compensations_run_in_exactly_the_reverse_order(soma_database: str, drawn: list[Any]) -> None:
    """23.2."""

    async def run() -> None:
        async with opened(soma_database) as sagas:
            await sagas.pool.fetch(TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
            started = await _started(sagas, drawn, soma_database, 2)
            async with sagas.worker(*{saga for _, saga, _ in started}):
                await until(lambda: _all_ended(sagas, {saga_id for saga_id, _, _ in started}))
            await _check(sagas, started, killed=False)

    asyncio.run(run())


@pytest.mark.timeout(900)  # some eighty processes are started, which take their time on a busy machine
@settings(max_examples=12, deadline=None, suppress_health_check=_QUIETLY)
@given(drawn=st.lists(specs(), min_size=3, max_size=6), seed=st.integers(0, 2**32))
def test_sagas_recover_from_killed_workers(soma_database: str, drawn: list[Any], seed: int) -> None:
    """23.3: real processes, killed and paused at random moments."""
    dice = random.Random(seed)

    async def run() -> None:
        async with opened(soma_database) as sagas:
            await sagas.pool.fetch(TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
            started = await _started(sagas, drawn, soma_database, 8)
            told = {saga.name: spec for _, saga, spec in started}
            with mock.patch.dict("os.environ", {"SOMA_TEST_SAGAS": json.dumps(told)}):
                await _storm(sagas, soma_database, {saga_id for saga_id, _, _ in started}, dice)
            await _check(sagas, started, killed=True)

    asyncio.run(run())


async def _storm(sagas: Sagas, dsn: str, ids: set[UUID], dice: random.Random) -> None:
    """Two workers; one after the other is killed or paused, and another one begins."""

    async def worker() -> WorkerProcess:
        return await asyncio.to_thread(WorkerProcess, dsn, "tests.saga_specs", lease=0.5, at_once=6, patience=50)

    workers = [await worker(), await worker()]
    try:
        for _ in range(4):
            await asyncio.sleep(dice.uniform(0.0, 0.25))  # a random moment of its work
            victim = workers.pop(0)
            if dice.random() < 0.3:
                victim.signal(signal.SIGSTOP)
                workers.append(await worker())
                victim.signal(signal.SIGCONT)
                await asyncio.sleep(dice.uniform(0.0, 0.1))
            await asyncio.to_thread(victim.kill)
            workers.append(await worker())
        await until(lambda: _all_ended(sagas, ids), within=120.0)
    finally:
        for each in workers:
            await asyncio.to_thread(each.kill)


def test_the_definitions_of_a_run_are_told(soma_database: str) -> None:
    """What the checks rest on: they see an undo in the wrong order, and an effect too many."""
    spec = [
        {"kind": "step", "tx": True, "undo": True, "careful": False, "flaky": 0, "ends": ends}
        for ends in ("done", "done", "refused")
    ]

    async def run() -> None:
        async with opened(soma_database) as sagas:
            await sagas.pool.fetch(TABLE)
            ((saga_id, saga, _),) = await _started(sagas, [spec], soma_database, 1)
            async with sagas.worker(saga):
                view = await sagas.ended(saga_id)
            assert view.tenant_id == TENANT
            good = [("p1", False), ("p2", False), ("p2", True), ("p1", True)]
            async with sagas.pool.connection() as connection:
                assert await effects_of(connection, saga_id) == good
            check(spec, view, good, killed=False)
            for bad in (good[:3], [*good[:2], good[3], good[2]], [good[0], *good], [*good, good[0]]):
                with pytest.raises(AssertionError):
                    check(spec, view, bad, killed=True)

    asyncio.run(run())
