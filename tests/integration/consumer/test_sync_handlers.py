"""Handlers that are plain functions, on psycopg's connections: the same promises as those that are ``async def``."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from soma_common.consumer.handlers import SyncBatchContext, SyncHandlerContext
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import TransactionConflict
from soma_common.events.models import Event
from soma_common.events.payloads import Payload
from soma_common.postgres.migrate import upgrade
from soma_common.retry import Backoff
from tests.integration.consumer.flavours import apply, execute, flavour_of
from tests.waiting import until


async def test_each_event_has_one_effect_in_order_on_few_threads(world: Any, flavour: Any) -> None:
    loop_thread = threading.get_native_id()
    seen: set[Any] = set()

    def handle(event: Any, ctx: Any) -> None:
        assert isinstance(ctx, SyncHandlerContext)
        seen.add(type(ctx.tx))
        apply(event, ctx)

    events = await world.publish(600, keys=40)
    async with world.log_worker(handle, connect=flavour.connect) as worker:
        await world.applied(600)
        events += await world.publish(100, keys=40, start=600)
        await world.applied(700)
        assert worker.stats().healthy
    await world.check(events)
    assert [kind.__module__ for kind in seen] == [
        "django.db.backends.postgresql.base" if flavour.is_django else "psycopg"
    ]
    rows = await world.pool.fetch("SELECT DISTINCT worker FROM effect")
    threads = {row[0] for row in rows}
    assert loop_thread not in threads
    assert 1 <= len(threads) <= worker.settings.lanes
    await until(lambda: not _handler_threads(), what="the threads end with their worker")
    await until(lambda: _has_backends(world, 0), what="and so do their connections")


def _handler_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("soma billing")]


async def _has_backends(world: Any, count: int) -> bool:
    """Whether so many connections of threads are there: psycopg ends a transaction with COMMIT, asyncpg with COMMIT;"""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query IN ('COMMIT', 'ROLLBACK')"
    return bool((await world.pool.fetch(sql))[0][0] == count)


async def test_models_and_several_handlers_share_a_transaction(world: Any, flavour: Any) -> None:
    class Paid(Payload, event_type="order.paid"):
        n: int

    order: list[Any] = []

    def typed(event: Any, ctx: Any) -> None:
        assert isinstance(event.payload, Paid)
        assert isinstance(ctx.event.payload, dict)
        order.append(("typed", event.payload.n))
        execute(ctx.tx, "INSERT INTO total VALUES (%s, 1)", (str(event.event_id),))

    worker = world.log_worker(typed, Paid, connect=flavour.connect)

    def named(event: Any, ctx: Any) -> None:
        order.append(("named", event.payload["n"]))
        rows = execute(ctx.tx, "SELECT n FROM total WHERE key = %s", (str(event.event_id),))
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
async def test_tenants_and_what_is_published_join_the_event(world: Any, flavour: Any, tenants: tuple[str, ...]) -> None:
    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        given = {"payload": {}, "event_type": "order.seen", "tenant_id": event.tenant_id}
        ctx.publish(Event(aggregate_id="x", **given), Event(aggregate_id="y", correlation_id="own", **given))
        if event.payload["n"] == 1:
            raise ValueError("no")

    events = [*(await world.publish(2, keys=2)), *(await world.publish(1, tenant_id="globex"))]
    async with world.log_worker(handle, "order.paid", connect=flavour.connect) as worker:
        await until(lambda: worker.stats().tally.applied + worker.stats().tally.dead == 3)
    assert worker.stats().tally.published == 4
    for tenant, first in zip(tenants, (events[0], events[2]), strict=True):
        found = await world.store.query(tenant_id=tenant, event_type="order.seen")
        assert [event.causation_id for event in found] == [str(first.event_id)] * 2
        assert [event.correlation_id for event in found] == [first.correlation_id, "own"]
        assert {event.trace_id for event in found} == {first.trace_id}
    assert sorted((row[1], row[3]) for row in await world.effects()) == [("acme", 0), ("globex", 0)]


async def test_batch_handlers_take_what_follows(world: Any, flavour: Any, settings: Any) -> None:
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
    worker = world.log_worker(
        handle, "order.paid", batch=True, settings=settings(lanes=1, redrives=0), connect=flavour.connect
    )
    async with worker:
        await until(lambda: worker.stats().tally.applied + worker.stats().tally.dead == 200)
    assert max(sizes) > 1
    await world.check([event for event in events if event.payload["n"] != 77])
    (letter,) = await world.letters()
    assert letter.letter.event.event_id == events[77].event_id


async def test_a_failing_event_holds_back_its_key_and_is_redriven_in_order(world: Any, flavour: Any) -> None:
    broken = True

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if broken and event.payload["n"] == 30:
            raise ValueError("bad luck")

    events = await world.publish(200, keys=20)
    behind = [event.event_id for event in events[30:] if event.stream == events[30].stream]
    async with world.log_worker(handle, connect=flavour.connect) as worker:
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


async def test_a_failing_event_is_retried_parked_and_tried_again_by_itself(world: Any, flavour: Any) -> None:
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
    async with world.log_worker(
        handle, settings=ConsumerSettings(retry=policy, redrive_every=0.02), connect=flavour.connect
    ):
        await world.applied(40)
    assert tries.count(True) == 2
    assert not tries[0]
    await world.check(events)


async def test_the_record_of_kafka_has_one_effect_in_the_order_of_its_key(world: Any, flavour: Any, topic: Any) -> None:
    events = await world.publish(300, keys=30)
    await topic.produce(events)
    await topic.produce(events[:50])
    async with world.worker(topic.source(world.pool), apply, connect=flavour.connect) as worker:
        await until(lambda: worker.stats().tally.settled == 350)
        assert worker.stats().tally.repeated == 50
    await world.check(events)


async def test_lanes_that_deadlock_are_let_in_one_by_one(world: Any, flavour: Any, settings: Any) -> None:
    await world.pool.fetch("INSERT INTO total SELECT 'row ' || n, 0 FROM generate_series(0, 3) n")

    def handle(event: Any, ctx: Any) -> None:
        n = event.payload["n"]
        for row in (n % 4, (n * 7 + 1 + n // 4) % 4):
            execute(ctx.tx, "UPDATE total SET n = n + 1 WHERE key = %s", (f"row {row}",))
        apply(event, ctx)

    await world.pool.fetch("ALTER DATABASE " + world.dsn.rpartition("/")[2] + " SET deadlock_timeout = '20ms'")
    events = await world.publish(300, keys=50)
    async with world.log_worker(handle, settings=settings(batch=20), connect=flavour.connect) as worker:
        await world.applied(300)
        assert worker.stats().tally.conflicts > 0
    await world.check(events)
    assert sum(row[0] for row in await world.pool.fetch("SELECT n FROM total")) == 600
    assert not await world.letters()


async def test_a_conflict_is_tried_again(world: Any, flavour: Any) -> None:
    tries = 0

    def handle(event: Any, ctx: Any) -> None:
        nonlocal tries
        apply(event, ctx)
        tries += 1
        if tries in (3, 5):
            execute(ctx.tx, "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
        if tries == 9:
            raise TransactionConflict

    events = await world.publish(20)
    async with world.log_worker(handle, settings=ConsumerSettings(lanes=1), connect=flavour.connect) as worker:
        await world.applied(20)
        assert worker.stats().tally.conflicts == 3
    await world.check(events)
    assert not await world.letters()


async def test_a_violated_constraint_is_the_events_fault(world: Any, flavour: Any, settings: Any) -> None:
    await world.pool.fetch("CREATE UNIQUE INDEX ON effect (number)")
    first = await world.publish(5, keys=5)
    again = await world.publish(1, start=3, aggregate_type="other")
    async with world.log_worker(apply, settings=settings(lanes=1), connect=flavour.connect) as worker:
        await until(lambda: worker.stats().tally.settled == 6)
    await world.check(first)
    (letter,) = await world.letters()
    assert letter.letter.event.event_id == again[0].event_id
    assert letter.letter.error_type == (
        "django.db.utils.IntegrityError" if flavour.is_django else "psycopg.errors.UniqueViolation"
    )


@pytest.mark.parametrize("bad", [0, 77, 199])
async def test_an_event_that_fails_only_at_commit_is_found_by_halving(
    world: Any, flavour: Any, settings: Any, bad: int
) -> None:
    async with world.pool.connection() as connection:
        await connection.execute(
            "CREATE TABLE good (n bigint PRIMARY KEY);"
            f"INSERT INTO good SELECT n FROM generate_series(0, 199) n WHERE n <> {bad};"
            "ALTER TABLE effect ADD FOREIGN KEY (number) REFERENCES good DEFERRABLE INITIALLY DEFERRED"
        )
    await world.publish(200, keys=200)
    async with world.log_worker(apply, settings=settings(batch=200, lanes=1), connect=flavour.connect) as worker:
        await until(lambda: worker.stats().tally.settled == 200)
        assert (
            worker.stats().tally.transactions <= 2 * 8 + 5
        )  # log2(200) levels; the first pages are small, and are batches of their own
    assert await world.count() == 199


async def test_retries_of_one_lane_do_not_hold_up_another(world: Any, flavour: Any) -> None:
    """Several lanes work at once: a slow handler of one key does not keep the others from theirs."""
    begun, go_on = threading.Event(), threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        if event.aggregate_id == "a0" and event.payload["n"] == 0:
            begun.set()
            assert go_on.wait(60)
        apply(event, ctx)

    events = await world.publish(80, keys=40)
    async with world.log_worker(handle, settings=ConsumerSettings(lanes=4, batch=5), connect=flavour.connect):
        await until(begun.is_set)
        await world.applied(40)
        assert await world.pool.fetch("SELECT FROM effect WHERE key = 'acme:default:a0'") == []
        go_on.set()
        await world.applied(80)
    await world.check(events)


async def test_the_runtime_role_is_enough(world: Any) -> None:
    role = "soma_app_" + world.dsn[-8:]
    await world.pool.fetch(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        await upgrade(world.dsn, grant_to=role)
        await world.pool.fetch(f"GRANT ALL ON effect, effect_seq_seq TO {role}")
        mine = re.sub(r"//[^@]+@", f"//{role}:pw@", world.dsn)
        events = await world.publish(30)
        for name in ("psycopg", "django"):
            with flavour_of(name, mine) as flavour:
                async with world.log_worker(apply, consumer=name, connect=flavour.connect):
                    await world.applied(30 if name == "psycopg" else 60)
        assert len(events) == 30
        owners = await world.pool.fetch("SELECT count(*), count(DISTINCT event_id) FROM effect")
        assert tuple(owners[0]) == (60, 30)
    finally:
        await world.pool.fetch(f"DROP OWNED BY {role}")
        await world.pool.fetch(f"DROP ROLE {role}")
