"""Worker processes that are killed, paused or kill themselves."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.views import SagaView
from tests.integration.sagas.programs import ASKING, CAREFUL, LOCKING, LOCKING_IN_THREAD, PLAIN, SAGAS, Job
from tests.saga_process import working
from tests.saga_support import Sagas, opened, told
from tests.sessions import SESSIONS
from tests.waiting import until

MODULE = "tests.integration.sagas.programs"
QUICK = {"lease": 1.0, "patience": 2}


@pytest.fixture
async def sagas(soma_database: str) -> AsyncIterator[Sagas]:
    async with opened(soma_database, *SAGAS) as found:
        await found.pool.fetch("CREATE TABLE done (what text NOT NULL, place serial)")
        yield found


async def done(sagas: Sagas) -> list[str]:
    return [row[0] for row in await sagas.pool.fetch("SELECT what FROM done ORDER BY place")]


async def began(sagas: Sagas, times: int = 1) -> list[str]:
    """What was done, once the second step has begun so often."""

    async def look() -> Any:
        found = await done(sagas)
        return found if sum(what.startswith("second") for what in found) >= times else None

    found: list[str] = await until(look, what="the second step")
    return found


async def calm(sagas: Sagas, saga_id: UUID, dsn: str) -> None:
    """From the next attempt on the second step does nothing special."""
    calmed = "UPDATE soma.sagas SET input = json_build_object('dsn', $2::text, 'how', '') WHERE saga_id = $1"
    await sagas.pool.fetch(calmed, saga_id, dsn)


async def test_another_worker_goes_on_where_a_killed_one_was(sagas: Sagas, soma_database: str) -> None:
    saga_id = await sagas.start(PLAIN, Job(soma_database, "exit-once"))
    with working(soma_database, MODULE, **QUICK) as one, working(soma_database, MODULE, **QUICK) as two:
        assert await sagas.orchestrator.result(saga_id) == "second"
        assert sorted([one.exit_code or 0, two.exit_code or 0]) == [0, 3]
    found = await done(sagas)
    assert [what.rpartition(" ")[0] or what for what in found] == ["first", "second second", "second second", "third"]
    assert found[1] != found[2]  # by two processes, under one key


async def test_what_a_killed_worker_may_have_done_is_undone_or_asked_for(sagas: Sagas, soma_database: str) -> None:
    careful = await sagas.start(CAREFUL, Job(soma_database, "sleep"))
    asking = await sagas.start(ASKING, Job(soma_database, "sleep"))
    with working(soma_database, MODULE, **QUICK) as first:
        await began(sagas, 2)
        first.kill()
    with working(soma_database, MODULE, **QUICK):
        view = await sagas.ended(careful)
        asked = await sagas.ended(asking)
    assert told(view.journal) == [
        "done first", "begun second", "unknown second", "failed second", "turned", "undone second", "undone first", "ended",
    ]  # fmt: skip
    assert "unsecond second:undo None" in await done(sagas)
    assert asked.status is SagaStatus.STUCK
    assert told(asked.journal) == ["done first", "begun second", "unknown second", "stuck"]


@pytest.mark.parametrize("how", ["exit", "kill"])
async def test_a_step_that_kills_its_worker_is_found(sagas: Sagas, soma_database: str, how: str) -> None:
    """It is claimed 2 * patience times, alone from the second time on; another saga is not harmed by it."""
    poison = await sagas.start(PLAIN, Job(soma_database, how))
    good = await sagas.start(PLAIN, Job(soma_database))
    deaths, view = 0, None
    while view is None:
        with working(soma_database, MODULE, **QUICK) as worker:

            async def look() -> SagaView | bool:
                found = await sagas.orchestrator.get_saga(poison)
                return worker.exit_code is not None or (found.status is SagaStatus.STUCK and found)

            found = await until(look)
            view = found if isinstance(found, SagaView) else None
            deaths += view is None
    assert deaths == 5  # the first one of them had written something before
    assert view.error_type == "WorkerDied"
    assert view.error is not None
    assert "4 times in a row" in view.error
    with working(soma_database, MODULE, **QUICK):
        assert await sagas.orchestrator.result(good) == "second"
        await sagas.orchestrator.compensate(poison, reason="it kills", who="ann")
        view = await sagas.ended(poison)
    assert view.status is SagaStatus.COMPENSATED
    assert (await done(sagas)).count("unfirst") == 1


async def test_a_worker_that_was_paused_writes_nothing_when_it_wakes(sagas: Sagas, soma_database: str) -> None:
    saga_id = await sagas.start(PLAIN, Job(soma_database, "pause"))
    with working(soma_database, MODULE, **QUICK) as zombie:
        await began(sagas)
        await calm(sagas, saga_id, soma_database)
        with working(soma_database, MODULE, **QUICK):
            assert await sagas.orchestrator.result(saga_id) == "second"
            zombie.signal(signal.SIGCONT)
            other = await sagas.start(PLAIN, Job(soma_database))
            assert await sagas.orchestrator.result(other) == "second"
        zombie.signal(signal.SIGTERM)
        assert zombie.wait() == 0
    view = await sagas.orchestrator.get_saga(saga_id)
    assert told(view.journal) == ["done first", "done second", "done third", "ended"]
    assert (await done(sagas)).count("third") == 2  # one for each saga


@pytest.mark.parametrize("saga", [LOCKING, LOCKING_IN_THREAD], ids=["async", "thread"])
async def test_a_worker_that_stays_paused_in_a_transaction_keeps_no_locks(
    sagas: Sagas, soma_database: str, saga: Saga
) -> None:
    """Nobody wakes it, as when its machine is gone: PostgreSQL ends its transaction, and another worker goes on."""
    await sagas.pool.fetch("INSERT INTO done (what) VALUES ('locked')")
    saga_id = await sagas.start(saga, Job(soma_database, "pause"))
    with working(soma_database, MODULE, **QUICK) as paused:
        holder = f"SELECT count(*) FROM {SESSIONS} WHERE state = 'idle in transaction' AND query LIKE 'UPDATE done%'"

        async def stands_still() -> bool:
            return bool((await sagas.pool.fetch(holder))[0][0])

        await until(stands_still, what="the step that holds a lock")
        await calm(sagas, saga_id, soma_database)
        with working(soma_database, MODULE, **QUICK):
            assert await sagas.orchestrator.result(saga_id) == "held"
        assert paused.exit_code is None
    assert await done(sagas) == ["locked!"]


async def test_a_step_that_blocks_its_process_loses_its_saga(sagas: Sagas, soma_database: str) -> None:
    saga_id = await sagas.start(PLAIN, Job(soma_database, "block"))
    with working(soma_database, MODULE, **QUICK):
        await began(sagas)
        await calm(sagas, saga_id, soma_database)
        with working(soma_database, MODULE, **QUICK):
            assert await sagas.orchestrator.result(saga_id) == "second"


async def test_a_process_that_forks_in_a_step_stays_one(sagas: Sagas, soma_database: str) -> None:
    saga_id = await sagas.start(PLAIN, Job(soma_database, "fork"))
    with working(soma_database, MODULE, **QUICK) as worker:
        assert await sagas.orchestrator.result(saga_id) == "second"
        again = await sagas.start(PLAIN, Job(soma_database))
        assert await sagas.orchestrator.result(again) == "second"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    view = await sagas.orchestrator.get_saga(saga_id)
    assert told(view.journal) == ["done first", "done second", "done third", "ended"]


async def test_a_worker_that_is_asked_to_stop_gives_its_sagas_back(sagas: Sagas, soma_database: str) -> None:
    saga_id = await sagas.start(PLAIN, Job(soma_database, "sleep"))
    with working(soma_database, MODULE, lease=60.0, stop_within=1.0) as worker:
        await began(sagas)
        worker.signal(signal.SIGTERM)
        await calm(sagas, saga_id, soma_database)
        assert worker.wait(within=45.0) == 0
    with working(soma_database, MODULE, lease=60.0):
        assert await sagas.orchestrator.result(saga_id, timeout=20.0) == "second"
