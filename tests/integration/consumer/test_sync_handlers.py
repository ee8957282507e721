"""Handlers that are plain functions, on psycopg's connections: the same promises as those that are ``async def``."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from soma_common.consumer.handlers import SyncBatchContext, SyncHandlerContext
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import ConfigurationError, MissingDependency, TransactionConflict
from soma_common.events.models import Event
from soma_common.events.payloads import Payload
from soma_common.postgres.pool import PoolSettings
from soma_common.postgres.threads import connecting
from soma_common.retry import Backoff
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.postgres.migrate import upgrade
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.waiting import until

EFFECT = "INSERT INTO effect (event_id, tenant, key, number, worker) VALUES (%s, %s, %s, %s, %s)"
QUICK = Backoff(base=0.02, maximum=0.2)


def apply(event: Any, ctx: SyncHandlerContext) -> None:
    """A row per application."""
    given = (event.event_id, event.tenant_id, str(event.stream), event.payload["n"], threading.get_native_id())
    ctx.tx.execute(EFFECT, given)


async def test_each_event_has_one_effect_in_order_on_few_threads(world: Any) -> None:
    loop_thread = threading.get_native_id()
    seen: set[Any] = set()

    def handle(event: Any, ctx: Any) -> None:
        assert isinstance(ctx, SyncHandlerContext)
        seen.add(type(ctx.tx))
        apply(event, ctx)

    events = await world.publish(600, keys=40)
    async with world.log_worker(handle) as worker:
        await world.applied(600)
        events += await world.publish(100, keys=40, start=600)
        await world.applied(700)
        assert worker.stats().healthy
    await world.check(events)
    assert seen == {psycopg.Connection}
    rows = await world.pool.fetch("SELECT DISTINCT worker FROM effect")
    threads = {row[0] for row in rows}
    assert loop_thread not in threads
    assert 1 <= len(threads) <= worker.settings.lanes
    await until(lambda: not _handler_threads(), what="the threads end with their worker")
    assert await _backends(world, "soma-common", own=False) == 0


def _handler_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("soma billing")]


async def _backends(world: Any, name: str, *, own: bool) -> int:
    """Connections by psycopg, told by what they last ran: psycopg ends with COMMIT, ROLLBACK."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND query IN ('COMMIT', 'ROLLBACK')"
    return int((await world.pool.fetch(sql + " AND pid <> pg_backend_pid()", name))[0][0])


async def test_models_and_several_handlers_share_a_transaction(world: Any) -> None:
    class Paid(Payload, event_type="order.paid"):
        n: int

    order: list[Any] = []

    def typed(event: Any, ctx: Any) -> None:
        assert isinstance(event.payload, Paid)
        assert isinstance(ctx.event.payload, dict)
        order.append(("typed", event.payload.n))
        ctx.tx.execute("INSERT INTO total VALUES (%s, 1)", (str(event.event_id),))

    worker = world.log_worker(typed, Paid)

    def named(event: Any, ctx: Any) -> None:
        order.append(("named", event.payload["n"]))
        rows = ctx.tx.execute("SELECT n FROM total WHERE key = %s", (str(event.event_id),)).fetchall()
        assert rows == [(1,)]
        if event.payload["n"] == 3:
            raise ValueError("the second handler fails")

    worker._effects.handlers.add(named, "order.paid")
    events = await world.publish(5, keys=5)
    async with worker:
        await until(lambda: worker.stats().tally.settled == 5)
    kept = {row[0] for row in await world.pool.fetch("SELECT key FROM total")}
    assert kept == {str(event.event_id) for event in events if event.payload["n"] != 3}
    assert all(order.index(("typed", n)) < order.index(("named", n)) for n in range(5))


@pytest.mark.parametrize("tenants", [("acme", "globex")])
async def test_tenants_and_what_is_published_join_the_event(world: Any, tenants: tuple[str, ...]) -> None:
    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        given = {"payload": {}, "event_type": "order.seen", "tenant_id": event.tenant_id}
        ctx.publish(Event(aggregate_id="x", **given), Event(aggregate_id="y", correlation_id="own", **given))
        if event.payload["n"] == 1:
            raise ValueError("no")

    events = [*(await world.publish(2, keys=2)), *(await world.publish(1, tenant_id="globex"))]
    async with world.log_worker(handle, "order.paid") as worker:
        await until(lambda: worker.stats().tally.settled == 3)
    assert worker.stats().tally.published == 4
    for tenant, first in zip(tenants, (events[0], events[2]), strict=True):
        found = await world.store.query(tenant_id=tenant, event_type="order.seen")
        assert [event.causation_id for event in found] == [str(first.event_id)] * 2
        assert [event.correlation_id for event in found] == [first.correlation_id, "own"]
        assert {event.trace_id for event in found} == {first.trace_id}
    assert sorted((row[1], row[3]) for row in await world.effects()) == [("acme", 0), ("globex", 0)]


async def test_batch_handlers_take_what_follows(world: Any, settings: Any) -> None:
    sizes: list[int] = []

    def handle(events: Any, ctx: Any) -> None:
        assert isinstance(ctx, SyncBatchContext)
        assert [event.event_id for event in ctx.events] == [event.event_id for event in events]
        sizes.append(len(events))
        for event in events:
            apply(event, ctx)  # type: ignore[arg-type]  # it has a tx
        if any(event.payload["n"] == 77 for event in events):
            raise ValueError("bad luck")
        ctx.publish(Event(payload={}, event_type="seen", tenant_id="acme", aggregate_id="s"), cause=events[0])

    events = await world.publish(200, keys=200)
    worker = world.log_worker(handle, "order.paid", batch=True, settings=settings(lanes=1, redrives=0))
    async with worker:
        await until(lambda: worker.stats().tally.settled == 200)
    assert max(sizes) > 1
    await world.check([event for event in events if event.payload["n"] != 77])
    (letter,) = await world.letters()
    assert letter.letter.event.event_id == events[77].event_id


async def test_a_failing_event_holds_back_its_key_and_is_redriven_in_order(world: Any) -> None:
    broken = True

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if broken and event.payload["n"] == 30:
            raise ValueError("bad luck")

    events = await world.publish(200, keys=20)
    behind = [event.event_id for event in events[30:] if event.stream == events[30].stream]
    async with world.log_worker(handle) as worker:
        await until(lambda: worker.stats().tally.settled == 200)
        letters = await world.letters()
        assert [letter.letter.event.event_id for letter in letters] == behind
        assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * (len(behind) - 1)
        broken = False
        assert await world.dlq.retry_event(letters[0].letter.letter_id)
        await world.applied(200)
        await until(lambda: worker.stats().tally.redriven == len(behind))
    assert {letter.letter.status for letter in await world.letters()} == {"resolved"}
    await world.check(events)


async def test_a_failing_event_is_retried_parked_and_tried_again_by_itself(world: Any) -> None:
    tries: list[bool] = []

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] == 7:
            tries.append(ctx.delivery.redriven)
            if sum(tries) < 2:
                raise ValueError("bad luck")

    events = await world.publish(40, keys=4)
    policy = RetryPolicy(
        tries=2, backoff=Backoff(base=0.01, maximum=0.02), parked=RedrivePolicy(after=0.05, tries=3, factor=1.0)
    )
    async with world.log_worker(handle, settings=ConsumerSettings(retry=policy, redrive_every=0.02)):
        await world.applied(40)
    assert tries.count(True) == 2
    assert not tries[0]
    await world.check(events)


async def test_the_record_of_kafka_has_one_effect_in_the_order_of_its_key(world: Any, topic: Any) -> None:
    events = await world.publish(300, keys=30)
    await topic.produce(events)
    await topic.produce(events[:50])
    async with world.worker(topic.source(world.pool), apply) as worker:
        await until(lambda: worker.stats().tally.settled == 350)
        assert worker.stats().tally.repeated == 50
    await world.check(events)


async def test_lanes_that_deadlock_are_let_in_one_by_one(world: Any, settings: Any) -> None:
    await world.pool.fetch("INSERT INTO total SELECT 'row ' || n, 0 FROM generate_series(0, 3) n")

    def handle(event: Any, ctx: Any) -> None:
        n = event.payload["n"]
        for row in (n % 4, (n * 7 + 1 + n // 4) % 4):
            ctx.tx.execute("UPDATE total SET n = n + 1 WHERE key = %s", (f"row {row}",))
        apply(event, ctx)

    await world.pool.fetch("ALTER DATABASE " + world.dsn.rpartition("/")[2] + " SET deadlock_timeout = '20ms'")
    events = await world.publish(300, keys=50)
    async with world.log_worker(handle, settings=settings(batch=20)) as worker:
        await world.applied(300)
        assert worker.stats().tally.conflicts > 0
    await world.check(events)
    assert sum(row[0] for row in await world.pool.fetch("SELECT n FROM total")) == 600
    assert not await world.letters()


async def test_a_conflict_is_tried_again(world: Any) -> None:
    tries = 0

    def handle(event: Any, ctx: Any) -> None:
        nonlocal tries
        apply(event, ctx)
        tries += 1
        if tries in (3, 5):
            ctx.tx.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
        if tries == 9:
            raise TransactionConflict

    events = await world.publish(20)
    async with world.log_worker(handle, settings=ConsumerSettings(lanes=1)) as worker:
        await world.applied(20)
        assert worker.stats().tally.conflicts == 3
    await world.check(events)
    assert not await world.letters()


async def test_a_violated_constraint_is_the_events_fault(world: Any, settings: Any) -> None:
    await world.pool.fetch("CREATE UNIQUE INDEX ON effect (number)")
    first = await world.publish(5, keys=5)
    again = await world.publish(1, start=3, aggregate_type="other")
    async with world.log_worker(apply, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 6)
    await world.check(first)
    (letter,) = await world.letters()
    assert letter.letter.event.event_id == again[0].event_id
    assert letter.letter.error_type == "psycopg.errors.UniqueViolation"


@pytest.mark.parametrize("bad", [0, 77, 199])
async def test_an_event_that_fails_only_at_commit_is_found_by_halving(world: Any, settings: Any, bad: int) -> None:
    async with world.pool.connection() as connection:
        await connection.execute(
            "CREATE TABLE good (n bigint PRIMARY KEY);"
            f"INSERT INTO good SELECT n FROM generate_series(0, 199) n WHERE n <> {bad};"
            "ALTER TABLE effect ADD FOREIGN KEY (number) REFERENCES good DEFERRABLE INITIALLY DEFERRED"
        )
    await world.publish(200, keys=200)
    async with world.log_worker(apply, settings=settings(batch=200, lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 200)
        assert worker.stats().tally.transactions <= 2 * 8 + 1  # log2(200) levels
    assert await world.count() == 199


def _swallow(event: Any, ctx: Any) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        ctx.tx.execute("SELECT 1/0")


def _raw_commit(event: Any, ctx: Any) -> None:
    ctx.tx.execute(" commit ")


def _hidden_rollback(event: Any, ctx: Any) -> None:
    ctx.tx.execute("/* hidden */ ROLLBACK")


def _commit(event: Any, ctx: Any) -> None:
    ctx.tx.commit()


def _with(event: Any, ctx: Any) -> None:
    with ctx.tx:
        pass


def _close(event: Any, ctx: Any) -> None:
    ctx.tx.close()


def _close_and_go_on(event: Any, ctx: Any) -> None:
    ctx.tx.close()
    apply(event, ctx)


def _left_open(event: Any, ctx: Any) -> None:
    ctx.tx.execute("COPY total TO STDOUT")
    ctx.tx.pgconn.send_query(b"SELECT pg_sleep(0)")


async def _returns_coroutine() -> None:
    """Never awaited."""


def _coroutine(event: Any, ctx: Any) -> Any:
    return _returns_coroutine()


def _stop(event: Any, ctx: Any) -> None:
    next(iter(()))


def _cancel(event: Any, ctx: Any) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("misdeed", "told"),
    [
        (_swallow, "went on after an error of the database"),
        (_raw_commit, "asked for commit"),
        (_hidden_rollback, "ended the transaction"),
        (_commit, "forbidden within a Transaction"),
        (_with, "forbidden within a Transaction"),
        (_close, "closed the connection"),
        (_close_and_go_on, "connection is closed"),
        (_coroutine, "returned a coroutine"),
        (_stop, "StopIteration"),
        (_cancel, "CancelledError"),
    ],
)
@pytest.mark.parametrize("keys", [1, 60])
async def test_only_the_event_whose_handler_misbehaves_is_blamed(
    world: Any, settings: Any, misdeed: Any, told: str, keys: int
) -> None:
    def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 20:
            misdeed(event, ctx)
        else:
            apply(event, ctx)

    events = await world.publish(60, keys=keys)
    async with world.log_worker(handle, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 60)
        assert worker.stats().running
    letters = await world.letters()
    assert letters[0].letter.event.event_id == events[20].event_id
    assert told in (letters[0].message or "")
    assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * (39 if keys == 1 else 0)
    await world.check(events[:20] if keys == 1 else [event for event in events if event.payload["n"] != 20])


async def test_savepoints_and_settings_of_a_connection_do_no_harm(world: Any) -> None:
    def handle(event: Any, ctx: Any) -> None:
        assert ctx.tx.execute("SELECT 1").fetchone() == (1,)  # no row factory of the one before
        with suppress(ZeroDivisionError), ctx.tx.transaction():
            ctx.tx.execute("INSERT INTO total VALUES ('never', 1)")
            raise ZeroDivisionError
        with suppress(psycopg.errors.DivisionByZero), ctx.tx.transaction():
            ctx.tx.execute("SELECT 1/0")
        ctx.tx.execute("SAVEPOINT mine")
        ctx.tx.execute("ROLLBACK TO SAVEPOINT mine")
        apply(event, ctx)
        ctx.tx.row_factory = psycopg.rows.dict_row

    events = await world.publish(30, keys=10)
    async with world.log_worker(handle, settings=ConsumerSettings(batch=1)):
        await world.applied(30)
    await world.check(events)
    assert not await world.pool.fetch("SELECT * FROM total")


async def test_a_transaction_left_open_by_a_handler_is_found(world: Any, settings: Any) -> None:
    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] == 3:
            ctx.tx.transaction().__enter__()

    await world.publish(6, keys=6)
    async with world.log_worker(handle, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 6)
    (letter,) = await world.letters()
    assert letter.letter.error_type == "psycopg.OutOfOrderTransactionNesting"
    assert await world.count() == 5


async def test_the_session_of_a_batch_is_guarded(world: Any) -> None:
    """As asyncpg's: READ COMMITTED, commits reach the disk, a silent process does not keep its locks."""
    found: list[Any] = []

    def handle(event: Any, ctx: Any) -> None:
        names = ("transaction_isolation", "synchronous_commit", "idle_in_transaction_session_timeout", "application_name")
        found.append([ctx.tx.execute(f"SHOW {name}").fetchone()[0] for name in names])

    database = world.dsn.rpartition("/")[2]
    for setting in ("default_transaction_isolation = 'serializable'", "synchronous_commit = 'off'"):
        await world.pool.fetch(f"ALTER DATABASE {database} SET {setting}")
    await world.publish(1)
    async with world.log_worker(handle, settings=ConsumerSettings(timeout=3, idle_timeout=7)):
        await until(lambda: found)
    assert found[0] == ["read committed", "on", "7s", "soma-common"]


async def test_retries_of_one_lane_do_not_hold_up_another(world: Any) -> None:
    """Several lanes work at once: a slow handler of one key does not keep the others from theirs."""
    begun, go_on = threading.Event(), threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        if event.aggregate_id == "a0" and event.payload["n"] == 0:
            begun.set()
            assert go_on.wait(60)
        apply(event, ctx)

    events = await world.publish(80, keys=40)
    async with world.log_worker(handle, settings=ConsumerSettings(lanes=4, batch=5)):
        await until(begun.is_set)
        await world.applied(40)
        assert await world.pool.fetch("SELECT FROM effect WHERE key = 'acme:default:a0'") == []
        go_on.set()
        await world.applied(80)
    await world.check(events)


async def test_a_broken_address_is_told_at_once(world: Any) -> None:
    for dsn in ("postgresql://h/d?nonsense=1", "postgresql://h:port/d"):
        with pytest.raises(ConfigurationError, match="libpq"):
            connecting(PoolSettings(dsn))


def test_without_psycopg_the_message_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from soma_common.postgres.threads import connecting\n"
        "from soma_common.postgres.pool import PoolSettings\n"
        "connecting(PoolSettings('postgresql://h/d'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert done.returncode == 1
    assert "MissingDependency" in done.stderr
    assert "soma-common[psycopg]" in done.stderr
    with pytest.raises(MissingDependency):
        raise MissingDependency
