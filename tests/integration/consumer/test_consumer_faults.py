"""Consumers of the log that are killed, paused, cut off: real processes, real signals, one effect per event."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from typing import Any

import psycopg
import pytest

from soma_common.consumer.settings import ConsumerSettings
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.waiting import until

QUICK = Backoff(base=0.02, maximum=0.2)


async def _ended(process: Any, within: float = 30.0) -> int:
    return await asyncio.wait_for(asyncio.to_thread(process.wait), within)


@pytest.mark.parametrize("stage", ["handler", "batch", "save", "saved", "stored"])
async def test_killed_at_a_stage(world: Any, stage: str) -> None:
    """In a handler, right after a COMMIT, while positions are written: the next process goes on with what is missing."""
    events = await world.publish(300, keys=10)
    after = {"handler": 120, "batch": 2}.get(stage, 1)
    quick = {"batch": 50, "lanes": 1, "save_every": 0.005, "slow": 0.001}
    victim = world.process(lease=1.0, echo=True, die={"stage": stage, "after": after}, **quick)
    assert await _ended(victim) == -signal.SIGKILL
    count = await world.count()
    assert 0 < count < (120 if stage in ("handler", "batch") else 300)
    await world.whole_batches()
    world.process(batch=50, lease=1.0, echo=True)
    await world.applied(300)
    await world.check(events)
    echoes = await world.store.query(tenant_id="acme", event_type="consumer.echo", limit=1000)
    assert sorted(event.payload["n"] for event in echoes) == list(range(300))
    totals = await world.pool.fetch("SELECT n FROM total")
    assert [row[0] for row in totals] == [30] * 10


async def test_killed_at_random_while_others_work(world: Any) -> None:
    dice = random.Random(20261123)
    events: list[Any] = []
    processes = [world.process(batch=20, lease=0.6, slow=0.001) for _ in range(2)]
    for round_ in range(6):
        events += await world.publish(150, keys=25, start=150 * round_)
        await asyncio.sleep(dice.uniform(0.1, 0.8))
        victim = processes.pop(dice.randrange(len(processes)))
        victim.kill()
        await _ended(victim)
        processes.append(world.process(batch=20, lease=0.6, slow=0.001))
    await world.applied(900, within=60)
    await world.check(events)


async def test_a_paused_process_that_wakes_after_its_lease_does_no_harm(world: Any) -> None:
    """Its transaction was ended by PostgreSQL, its shards went to another; it finds out, and takes part again."""
    events = await world.publish(400, keys=20)
    zombie = world.process(batch=50, lease=0.6, slow=0.005, idle=1.0)
    await world.applied(50)
    zombie.send_signal(signal.SIGSTOP)
    world.process(batch=50, lease=0.6, idle=1.0)
    await world.applied(400)
    zombie.send_signal(signal.SIGCONT)
    await until(lambda: _owns(world, zombie), what="the zombie takes part again")
    events += await world.publish(100, keys=20, start=400)
    await world.applied(500)
    await world.check(events)
    assert zombie.poll() is None
    zombie.terminate()
    assert await _ended(zombie) == 0


async def _owns(world: Any, process: Any) -> bool:
    sql = "SELECT FROM soma.shards WHERE owner LIKE $1 AND leased_until > soma.now()"
    return bool(await world.pool.fetch(sql, f"%-{process.pid}-%"))


async def test_sigterm_drains(world: Any) -> None:
    events = await world.publish(200, keys=10)
    first = world.process(batch=20, slow=0.005)
    await world.applied(20)
    first.terminate()
    assert await _ended(first) == 0
    await world.whole_batches()
    assert not await world.pool.fetch("SELECT FROM soma.shards WHERE owner IS NOT NULL"), "a shard was not released"
    world.process()
    await world.applied(200)
    await world.check(events)


@pytest.mark.parametrize("when", [CommitCut.BEFORE, CommitCut.AFTER])
async def test_the_connection_is_cut_at_commit(world: Any, when: CommitCut) -> None:
    """The worker cannot know whether it committed; the stored position and the inbox do."""
    events = await world.publish(300, keys=10)
    with proxy_to(world.dsn) as proxy:
        pool = world.pool
        async with Pool(proxy.through(world.dsn)) as world.pool:
            worker = world.log_worker(settings=ConsumerSettings(batch=20, backoff=QUICK))
            proxy.cut_at_commit(when, times=4)
            async with worker:
                await until(lambda: _effects(pool, 300), what="300 effects")
            assert proxy.commit_cuts == 4
        world.pool = pool
    await world.check(events)


async def _effects(pool: Pool, count: int) -> bool:
    return bool((await pool.fetch("SELECT count(*) FROM effect"))[0][0] == count)


async def test_a_database_that_goes_away_is_waited_for(world_at: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = PostgresServer.start()
    try:
        await upgrade(server.dsn)
        async with world_at(server.dsn) as world:
            events = await world.publish(100, keys=10)
            worker = world.log_worker(settings=ConsumerSettings(backoff=QUICK))
            with caplog.at_level(logging.INFO, logger="soma_common"):
                async with worker:
                    await world.applied(100)
                    server.kill()
                    await until(lambda: worker.stats().away)
                    assert not worker.stats().healthy
                    await until(lambda: worker._tries > 3, what="it tries again and again")
                    server.start_again()
                    await until(lambda: worker.stats().away is None)
                    await world.pool.wait_until_up(20)
                    events += await world.publish(100, keys=10, start=100)
                    await world.applied(200)
                    assert worker.stats().healthy
            await world.check(events)
    finally:
        server.close()
    told = [r.getMessage() for r in caplog.records if r.name == "soma_common.consumer.worker"]
    assert len([text for text in told if "waits" in text]) == 1
    assert len([text for text in told if "goes on" in text]) == 1


async def test_a_former_owner_that_stopped_within_a_statement_is_ended(world: Any, settings: Any) -> None:
    """PostgreSQL's idle timeout does not see it: to the server it is at work, on a statement that is being prepared."""
    events = await world.publish(20, keys=4)
    await world.pool.fetch("INSERT INTO soma.consumers (name) VALUES ('billing')")
    former = psycopg.connect(world.dsn)
    try:
        former.execute("SET idle_in_transaction_session_timeout = '200ms'")
        former.commit()
        former.execute(
            "INSERT INTO soma.inbox SELECT event_id, consumer_id, tenant_id, service_id FROM soma.events, soma.consumers"
        )
        former.pgconn.enter_pipeline_mode()
        former.pgconn.send_prepare(b"unfinished", b"SELECT 1")
        former.pgconn.send_flush_request()
        former.pgconn.flush()
        async with world.log_worker(settings=settings(timeout=1.0, idle_timeout=1.0)):
            await world.applied(20)
        gone = "SELECT FROM pg_stat_activity WHERE pid = $1"
        assert not await world.pool.fetch(gone, former.info.backend_pid)
    finally:
        former.pgconn.finish()
    await world.check(events)
