"""Plain functions that hang, are killed, lose their connection: one effect per event, in order, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import django.db
import psycopg
import pytest

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.integration.consumer.flavours import apply, execute, flavour_of
from tests.sessions import SESSIONS
from tests.waiting import until

QUICK = Backoff(base=0.02, maximum=0.2)
FLAVOURS = pytest.mark.parametrize("handlers", ["psycopg", "django"])
ERRORS = (psycopg.Error, django.db.Error)


async def _ended(process: Any, within: float = 60.0) -> int:
    return await asyncio.wait_for(asyncio.to_thread(process.wait), within)


@FLAVOURS
@pytest.mark.parametrize("stage", ["handler", "batch", "saved"])
async def test_killed_at_a_stage(world: Any, handlers: str, stage: str) -> None:
    events = await world.publish(300, keys=10)
    after = {"handler": 120, "batch": 2}.get(stage, 1)
    quick = {"batch": 50, "lanes": 1, "save_every": 0.005, "slow": 0.001}
    victim = world.process(handlers=handlers, lease=1.0, echo=True, die={"stage": stage, "after": after}, **quick)
    assert await _ended(victim) == -signal.SIGKILL
    count = await world.count()
    assert 0 < count < (120 if stage in ("handler", "batch") else 300)
    await world.whole_batches()
    world.process(handlers=handlers, batch=50, lease=1.0, echo=True)
    await world.applied(300, within=120)
    await world.check(events)
    echoes = await world.store.query(tenant_id="acme", event_type="consumer.echo", limit=1000)
    assert sorted(event.payload["n"] for event in echoes) == list(range(300))
    assert [row[0] for row in await world.pool.fetch("SELECT n FROM total")] == [30] * 10


@FLAVOURS
async def test_killed_at_random_while_others_work(world: Any, handlers: str) -> None:
    dice = random.Random(20261123)
    events: list[Any] = []
    given = {"handlers": handlers, "batch": 20, "lease": 0.6, "slow": 0.002}
    processes = [world.process(**given) for _ in range(2)]
    for round_ in range(4):
        events += await world.publish(150, keys=25, start=150 * round_)
        await asyncio.sleep(dice.uniform(0.1, 0.8))
        victim = processes.pop(dice.randrange(len(processes)))
        victim.kill()
        await _ended(victim)
        processes.append(world.process(**given))
    await world.applied(600, within=120)
    await world.check(events)


async def test_a_paused_process_that_wakes_after_its_lease_does_no_harm(world: Any) -> None:
    events = await world.publish(400, keys=20)
    given = {"handlers": "psycopg", "batch": 50, "lease": 0.6, "idle": 1.0}
    zombie = world.process(**given, slow=0.005)
    await world.applied(50)
    zombie.send_signal(signal.SIGSTOP)
    world.process(**given)
    await world.applied(400)
    zombie.send_signal(signal.SIGCONT)
    events += await world.publish(100, keys=20, start=400)
    await world.applied(500)
    await world.check(events)
    assert zombie.poll() is None
    zombie.terminate()
    assert await _ended(zombie) == 0


@FLAVOURS
async def test_a_handler_that_hangs_keeps_no_process_alive(world: Any, handlers: str) -> None:
    await world.publish(1)
    process = world.process(handlers=handlers, hang=0, drain=0.3)
    assert await asyncio.to_thread(process.stdout.readline) == "hangs\n"
    process.terminate()
    assert await _ended(process) == 0
    assert await world.count() == 0
    process = world.process(handlers=handlers)
    await world.applied(1)


@FLAVOURS
@pytest.mark.parametrize("when", [CommitCut.BEFORE, CommitCut.AFTER])
async def test_the_connection_is_cut_at_commit(world: Any, handlers: str, when: CommitCut) -> None:
    events = await world.publish(300, keys=10)
    with proxy_to(world.dsn) as proxy, flavour_of(handlers, proxy.through(world.dsn)) as flavour:
        worker = world.log_worker(apply, connect=flavour.connect, settings=ConsumerSettings(batch=20, backoff=QUICK))
        proxy.cut_at_commit(when, times=4)
        async with worker:
            await world.applied(300, within=120)
        assert proxy.commit_cuts == 4
        assert not await world.letters()
    await world.check(events)


@FLAVOURS
async def test_a_database_that_goes_away_is_waited_for(
    world_at: Any, handlers: str, caplog: pytest.LogCaptureFixture
) -> None:
    going = threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] >= 100 and not going.is_set():
            going.wait(60)
            execute(ctx.tx, "SELECT 1")

    server = PostgresServer.start()
    try:
        await upgrade(server.dsn)
        with flavour_of(handlers, server.dsn) as flavour:
            async with world_at(server.dsn) as world:
                events = await world.publish(100, keys=10)
                worker = world.log_worker(handle, connect=flavour.connect, settings=ConsumerSettings(backoff=QUICK))
                with caplog.at_level(logging.INFO, logger="soma_common"):
                    async with worker:
                        await world.applied(100)
                        events += await world.publish(100, keys=10, start=100)
                        await until(lambda: worker.stats().in_flight)
                        server.kill()  # in the middle of handlers
                        going.set()
                        await until(lambda: worker.stats().away)
                        server.start_again()
                        await until(lambda: worker.stats().away is None)
                        await world.pool.wait_until_up(20)
                        await world.applied(200)
                assert not await world.letters()
                await world.check(events)
    finally:
        going.set()
        server.close()
    told = [r.getMessage() for r in caplog.records if r.name == "soma_common.consumer.worker"]
    assert len([text for text in told if "goes on" in text]) >= 1


async def test_a_backend_that_is_terminated_under_a_handler_is_no_events_fault(world: Any, flavour: Any) -> None:
    killed = 0

    def handle(event: Any, ctx: Any) -> None:
        nonlocal killed
        apply(event, ctx)
        if killed < 3 and event.payload["n"] % 7 == 3:
            killed += 1
            with suppress(*ERRORS):  # it swallows the error besides
                execute(ctx.tx, "SELECT pg_terminate_backend(pg_backend_pid())")

    events = await world.publish(60, keys=6)
    async with world.log_worker(handle, connect=flavour.connect, settings=ConsumerSettings(backoff=QUICK)):
        await world.applied(60)
    assert killed == 3
    await world.check(events)
    assert not await world.letters()


async def test_idle_connections_that_the_server_ended_are_replaced_in_silence(world: Any, flavour: Any) -> None:
    events = await world.publish(50, keys=10)
    async with world.log_worker(apply, connect=flavour.connect) as worker:
        await world.applied(50)
        await until(lambda: not worker.stats().in_flight)
        sql = f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} WHERE query = 'COMMIT' AND state = 'idle'"
        assert await world.pool.fetch(sql)
        before = worker.stats().tally.transactions
        events += await world.publish(50, keys=10, start=50)
        await world.applied(100)
        assert worker.stats().tally.transactions > before
        assert worker.stats().away is None
        assert worker._tries == 0
    await world.check(events)


@pytest.mark.parametrize("how", ["python", "sql"])
async def test_a_handler_that_takes_too_long_is_tried_again(world: Any, flavour: Any, settings: Any, how: str) -> None:
    """In Python it ends by itself, in SQL its statement is cancelled; the time it took counts as a failure."""
    slow = True

    def handle(event: Any, ctx: Any) -> None:
        nonlocal slow
        apply(event, ctx)
        if slow:
            slow = False
            if how == "python":
                time.sleep(4.0)
            else:
                execute(ctx.tx, "SELECT pg_sleep(60)")

    events = await world.publish(5)
    policy = RetryPolicy(tries=3, backoff=Backoff(base=0.01, maximum=0.02))
    given = settings(timeout=2.0, retry=policy, lanes=1)
    began = time.monotonic()
    async with world.log_worker(handle, connect=flavour.connect, settings=given) as worker:
        await world.applied(5)
        assert worker.stats().tally.timeouts >= 1
    assert time.monotonic() - began < 55
    await world.check(events)
    assert not await world.letters()


@pytest.mark.parametrize("how", ["python", "sql"])
@pytest.mark.parametrize("batch", [False, True])
async def test_a_handler_that_hangs_is_left_behind_and_its_event_alone_is_dead(
    world: Any, flavour: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, how: str, batch: bool
) -> None:
    monkeypatch.setattr("soma_common.consumer.watchdog._GRACE", 1.0)
    over, tries, errors = threading.Event(), [], []

    def one(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] != 1:
            return
        tries.append(threading.current_thread())
        while not over.is_set():
            if how == "python":
                over.wait()
            else:
                try:
                    execute(ctx.tx, "SELECT pg_sleep(60)")
                except ERRORS as error:
                    errors.append(error)
                    over.wait(0.01)
        over.wait()

    def several(events: Any, ctx: Any) -> None:
        for event in events:
            one(event, ctx)

    await world.publish(50, keys=5)
    given = settings(timeout=2.0, redrives=0, batch=10)
    worker = world.log_worker(several if batch else one, connect=flavour.connect, settings=given, batch=batch)
    try:
        async with worker:
            await until(lambda: worker.stats().tally.settled >= 50)
            letters = await world.letters()
            assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * 9
            assert letters[0].letter.error_type == "soma_common.errors.HandlerTimeout"
            assert letters[0].letter.event.event_id is not None
            assert await world.count() == 40
            assert 1 <= len(tries) <= (2 if batch else 1)
            assert all(thread.is_alive() for thread in tries)
            busy = f"SELECT FROM {SESSIONS} WHERE query LIKE '%pg_sleep(60)' OR state LIKE 'idle in transaction%'"
            await until(lambda: _none(world, busy), what="its backend ended")
    finally:
        over.set()
    await until(lambda: not any(thread.is_alive() for thread in tries), what="the thread ends at last")
    assert await world.count() == 40, "nothing of it was committed"


async def _none(world: Any, sql: str) -> bool:
    return not await world.pool.fetch(sql)


async def test_a_worker_that_is_cancelled_lets_go_at_once(world: Any, flavour: Any) -> None:
    """Its handler still runs, but its transaction is over: the next worker does not wait for it."""
    entered, over = threading.Event(), threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] == 10 and not over.is_set():
            entered.set()
            over.wait()

    events = await world.publish(20, keys=1)
    worker = world.log_worker(handle, connect=flavour.connect)
    await worker.start()
    await until(entered.is_set)
    await worker.stop(0.1)
    began = time.monotonic()
    try:
        async with world.log_worker(apply, connect=flavour.connect):
            await world.applied(20)
        assert time.monotonic() - began < 25, "idle_in_transaction_session_timeout is 30 s"
    finally:
        over.set()
    await world.check(events)


async def test_a_letter_whose_handler_hangs_is_dead_without_end_of_the_others(
    world: Any, flavour: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a re-drive, too, the handler is left behind, and that counts as a try of the letter."""
    monkeypatch.setattr("soma_common.consumer.watchdog._GRACE", 1.0)
    over, redriven = threading.Event(), []

    def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 1:
            if not ctx.delivery.redriven:
                raise ValueError("bad luck")
            redriven.append(event)
            over.wait()
        apply(event, ctx)

    events = await world.publish(20, keys=20)
    policy = RetryPolicy(tries=1, parked=RedrivePolicy(after=0.05, tries=2, factor=1.0))
    worker = world.log_worker(handle, connect=flavour.connect, settings=settings(timeout=2.0, retry=policy))
    try:
        async with worker:
            await until(lambda: redriven)
            events += await world.publish(20, keys=20, start=20)
            await world.applied(38)
            await until(lambda: worker.stats().tally.dead)
            letters = await world.letters()
            assert [letter.letter.status for letter in letters] == ["dead", "blocked"]
            assert letters[0].letter.event.event_id == events[1].event_id
            assert letters[0].letter.error_type == "soma_common.errors.HandlerTimeout"
            assert len(redriven) == 2
    finally:
        over.set()


async def test_lanes_go_on_after_a_batch_was_given_up(world: Any, topic: Any, flavour: Any) -> None:
    """A partition is given away while a handler works on it; the lanes of the others are none the worse."""
    entered, over = threading.Event(), threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if not over.is_set():
            entered.set()
            over.wait()

    events = await world.publish(80, keys=40)
    await topic.produce(events)
    first = world.worker(
        topic.source(world.pool), handle, connect=flavour.connect, settings=ConsumerSettings(drain=0.5, lanes=2)
    )
    try:
        async with first:
            await until(entered.is_set)
            async with world.worker(topic.source(world.pool), apply, connect=flavour.connect) as second:
                await until(lambda: len(second.stats().partitions) == 2, within=90)
                over.set()
                more = await world.publish(80, keys=40, start=80)
                await topic.produce(more)
                await world.applied(160, within=120)
                assert len(first.stats().partitions) == 2
                assert first.stats().tally.applied > 0
        await world.check(events + more)
    finally:
        over.set()


async def test_an_async_handler_that_cancels_itself_is_blamed(world: Any, settings: Any) -> None:
    """And its lane goes on: a cancellation that nobody asked for is an error like another."""

    async def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 3:
            task = asyncio.create_task(asyncio.sleep(60))
            task.cancel()
            await task

    await world.publish(10, keys=10)
    async with world.log_worker(handle, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 10)
    (letter,) = await world.letters()
    assert "cancelled from within" in (letter.message or "")


async def test_the_pool_may_be_small(world: Any, flavour: Any) -> None:
    """Threads have connections of their own: lanes do not wait for those of the pool."""
    events = await world.publish(200, keys=50)
    pool = world.pool
    async with Pool(world.dsn) as small:
        world.pool = small
        async with world.log_worker(apply, connect=flavour.connect, settings=ConsumerSettings(lanes=16)):
            world.pool = pool
            await world.applied(200)
    await world.check(events)
