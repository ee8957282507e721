"""Consuming the event log: exactly one effect per event, in order, through failures of handlers and of the world."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.errors import ConfigurationError
from soma_common.events.models import Event
from soma_common.events.payloads import Payload
from soma_common.inbox import consumer_id
from soma_common.log.source import LogSettings, LogSource
from soma_common.retry import Backoff
from tests.waiting import until


class OrderPaid(Payload, event_type="order.paid"):
    n: int


async def test_every_event_has_one_effect_in_the_order_of_its_key(world: Any) -> None:
    events = await world.publish(1500, keys=30)
    async with world.log_worker() as worker:
        await world.applied(1500)
        events += await world.publish(300, keys=30, start=1500)
        await world.applied(1800)
        await until(lambda: worker.stats().tally.applied == 1800)  # counted when the commit has been answered
        stats = worker.stats()
    await world.check(events)
    assert stats.healthy
    assert stats.tally.applied == 1800
    assert len(stats.partitions) == 8


async def test_two_consumers_know_nothing_of_each_other(world: Any) -> None:
    await world.publish(100)
    async with world.log_worker(consumer="a") as first, world.log_worker(consumer="b") as second:
        await until(lambda: first.stats().tally.applied == second.stats().tally.applied == 100)


async def test_events_without_a_handler_are_counted_and_passed(world: Any, apply: Any) -> None:
    await world.publish(50, event_type="order.shipped")
    await world.publish(10, start=50)
    worker = world.log_worker(apply, "order.paid")
    async with worker:
        await until(lambda: worker.stats().tally.applied == 10 and worker.stats().tally.skipped == 50)
    assert await world.count() == 10
    # Their positions were stored: nothing is read again.
    async with world.log_worker(apply, "order.paid") as again:
        await world.publish(1, start=60)
        await world.applied(11)
        assert again.stats().tally.skipped < 50


async def test_a_typed_handler_gets_its_model(world: Any) -> None:
    seen: list[Any] = []

    async def handle(event: Any, ctx: Any) -> None:
        seen.append((event.payload, ctx.event.payload))

    await world.publish(1, start=7)
    async with world.log_worker(handle, OrderPaid):
        await until(lambda: seen)
    assert seen == [(OrderPaid(n=7), {"n": 7})]


async def test_a_payload_that_is_not_the_model_is_dead_at_once(world: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        raise AssertionError("it must not be called")

    await world.store.publish(Event(payload={"x": 1}, event_type="order.paid", tenant_id="acme", aggregate_id="a"))
    async with world.log_worker(handle, OrderPaid, settings=ConsumerSettings()) as worker:  # whatever the retries
        await until(lambda: worker.stats().tally.dead)
    (letter,) = await world.letters()
    assert (letter.letter.stage, letter.letter.attempts) == ("validate", 1)
    assert letter.letter.error_type == "soma_common.errors.PayloadInvalid"


async def test_given_keys_are_known_again(world: Any) -> None:
    """The same idempotency key of another service or tenant is another event."""
    key = {"idempotency_key": "once", "payload": {"n": 1}, "event_type": "order.paid", "aggregate_id": "a"}
    await world.store.publish([Event(tenant_id="t1", **key), Event(tenant_id="t2", **key)])
    async with world.log_worker():
        await world.applied(2)
    rows = await world.pool.fetch("SELECT tenant_id, idempotency_key FROM soma.inbox_keys ORDER BY 1")
    assert [tuple(row) for row in rows] == [("t1", "once"), ("t2", "once")]
    # Everything is read once more: the inbox knows it.
    await world.pool.fetch("UPDATE soma.shards SET from_tick = 0, from_token = 0, to_tick = NULL, to_token = NULL")
    async with world.log_worker() as again:
        await world.publish(1, start=2)
        await world.applied(3)
        await until(lambda: again.stats().tally.repeated == 2)


async def test_publish_inherits_and_commits_with_the_effects(world: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        await ctx.tx.execute("INSERT INTO total VALUES ($1, 1)", str(event.event_id))
        given = {"payload": {}, "event_type": "order.seen", "tenant_id": "acme"}
        ctx.publish(Event(aggregate_id="x", **given))
        ctx.publish(Event(aggregate_id="y", correlation_id="own", causation_id="mine", **given))
        if event.payload["n"] == 1:
            raise ValueError("no")

    first, _ = await world.publish(2, keys=1)
    async with world.log_worker(handle, "order.paid") as worker:
        await until(lambda: worker.stats().tally.dead)
    found = await world.store.query(tenant_id="acme", event_type="order.seen")
    assert len(await world.pool.fetch("SELECT * FROM total")) == 1  # the failing event left neither effect nor events
    assert [event.causation_id for event in found] == [str(first.event_id), "mine"]
    assert [event.correlation_id for event in found] == [first.correlation_id, "own"]
    assert {event.trace_id for event in found} == {first.trace_id}


async def test_shards_are_shared_and_change_hands_without_loss(world: Any) -> None:
    first = world.log_worker(lease=1.0)
    second = world.log_worker(lease=1.0)
    events = await world.publish(200, keys=50)
    async with first:
        await until(lambda: len(first.stats().partitions) == 8)
        async with second:
            await until(lambda: len(first.stats().partitions) == len(second.stats().partitions) == 4)
            events += await world.publish(400, keys=50, start=200)
            await world.applied(600)
            assert second.stats().tally.applied > 0
        events += await world.publish(100, keys=50, start=600)
        await world.applied(700)
        await until(lambda: len(first.stats().partitions) == 8)
    await world.check(events)


async def test_a_position_that_was_set_back_is_noticed(world: Any) -> None:
    """As after a failover to a standby that lagged: effects and positions go back together, and are made again."""
    events = await world.publish(100, keys=4)
    async with world.log_worker():
        await world.applied(100)
        await until(lambda: _all_stored(world), what="the cursors of idle shards are stored too")
        async with world.pool.transaction() as tx:
            await tx.execute("DELETE FROM effect WHERE number >= 50")
            await tx.execute("DELETE FROM soma.inbox WHERE event_id = ANY ($1)", [e.event_id for e in events[50:]])
            await tx.execute(
                "UPDATE soma.shards SET from_tick = 0, from_token = 0, to_tick = NULL, to_token = NULL, "
                "after_position = 0"
            )
        events += await world.publish(1, keys=4, start=100)
        await world.applied(101)
    rows = await world.effects()
    assert sorted(row[3] for row in rows) == list(range(101))


async def _all_stored(world: Any) -> bool:
    """True when every shard's cursor stands behind a whole page."""
    return not await world.pool.fetch("SELECT FROM soma.shards WHERE from_tick = 0 OR to_tick IS NOT NULL")


async def test_the_number_of_shards_is_fixed(world: Any) -> None:
    async with world.log_worker() as first:
        await until(lambda: first.stats().partitions)
    worker = world.log_worker(shards=16)
    await worker.start()
    with pytest.raises(ConfigurationError, match="8 shards"):
        await worker.wait()
    with pytest.raises(ConfigurationError):
        await worker.stop()
    world.workers.remove(worker)
    with pytest.raises(ConfigurationError):
        LogSettings(shards=6)


async def test_a_worker_that_is_stopped_finishes_its_batch(world: Any, apply: Any) -> None:
    entered = asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        entered.set()
        await asyncio.sleep(0.01)
        await apply(event, ctx)

    await world.publish(20, keys=1)
    worker = world.log_worker(handle)
    await worker.start()
    await entered.wait()
    await worker.stop()
    assert await world.count() == 20
    owners = await world.pool.fetch("SELECT DISTINCT owner FROM soma.shards")
    assert [row[0] for row in owners] == [None]


async def test_a_worker_that_is_cancelled_loses_nothing(world: Any, apply: Any) -> None:
    entered, hang = asyncio.Event(), True

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if hang and event.payload["n"] == 10:
            entered.set()
            await asyncio.sleep(60)

    events = await world.publish(20, keys=1)
    worker = world.log_worker(handle)
    await worker.start()
    await entered.wait()
    await worker.stop(0.1)
    hang = False
    async with world.log_worker(handle):
        await world.applied(20)
    await world.check(events)


async def test_a_handler_that_takes_too_long_is_cancelled_and_tried_again(
    world: Any, apply: Any, settings: Any
) -> None:
    slow = True

    async def handle(event: Any, ctx: Any) -> None:
        nonlocal slow
        if slow:
            slow = False
            await asyncio.sleep(60)
        await apply(event, ctx)

    events = await world.publish(5)
    policy = RetryPolicy(tries=2, backoff=Backoff(base=0.01, maximum=0.02))
    async with world.log_worker(handle, settings=settings(timeout=0.2, retry=policy)) as worker:
        await world.applied(5)
        assert worker.stats().tally.timeouts == 1
    await world.check(events)
    assert not await world.letters()


async def test_a_handler_that_blocks_its_process_is_found_out(world: Any, apply: Any, settings: Any) -> None:
    """Nobody can cancel it; PostgreSQL hangs up on its transaction, and the event is to blame for that."""

    async def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 1:
            time.sleep(1.0)  # noqa: ASYNC251 - that is the point
        await apply(event, ctx)

    await world.publish(5, keys=5)
    async with world.log_worker(handle, settings=settings(timeout=0.3, idle_timeout=0.3, lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 5)
    (letter,) = await world.letters()
    assert letter.letter.error_type == "soma_common.errors.HandlerTimeout"
    assert await world.count() == 4


async def test_a_handler_that_does_not_let_itself_be_cancelled_is_left_behind(
    world: Any, apply: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_common.consumer.watchdog._GRACE", 0.3)
    over = asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        while event.payload["n"] == 1 and not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()
        await apply(event, ctx)

    await world.publish(50, keys=5)
    async with world.log_worker(handle, settings=settings(timeout=0.3)) as worker:
        await until(lambda: worker.stats().tally.settled >= 50)
        over.set()
    letters = await world.letters()
    assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * 9
    assert letters[0].letter.error_type == "soma_common.errors.HandlerTimeout"
    assert await world.count() == 40


async def test_events_of_foreign_shape_do_not_pass_for_known_ones(world: Any) -> None:
    """An id that is no UUIDv7 is kept with the given keys: the inbox of ids goes by time."""
    given = {"payload": {"n": 1}, "event_type": "order.paid", "tenant_id": "acme", "aggregate_id": "a"}
    event = Event(event_id=uuid.uuid4(), **given)
    await world.store.publish(event)
    async with world.log_worker():
        await world.applied(1)
    assert not await world.pool.fetch("SELECT * FROM soma.inbox")
    assert len(await world.pool.fetch("SELECT * FROM soma.inbox_keys")) == 1


async def test_a_page_may_be_smaller_than_what_there_is(world: Any) -> None:
    events = await world.publish(500, keys=20)
    async with world.log_worker(page=7, settings=ConsumerSettings(batch=3)):
        await world.applied(500)
    await world.check(events)


def test_the_source_names_what_it_reads() -> None:
    source = LogSource(None, "billing")  # type: ignore[arg-type]  # nothing is read
    assert source.reader == "consumer:billing"
    assert not source.assigned


async def test_a_shard_whose_release_failed_is_read_again(world: Any, soma_database: str) -> None:
    """It is about to be given to a second worker when the connection breaks; then that worker is gone."""
    number = await consumer_id(world.pool, "billing")
    settings = LogSettings(lease=1.5, most_idle=0.02)
    first, second = (LogSource(world.pool, "billing", replace(settings, worker=name)) for name in "ab")
    other = await asyncpg.connect(soma_database)
    locked = other.transaction()
    drained: list[set[int]] = []

    async def drain(partitions: Any) -> None:
        drained.append({partition.number for partition in partitions})
        if len(drained) == 1:
            await locked.start()
            await other.execute("SELECT FROM soma.shards WHERE shard = $1 FOR UPDATE", partitions[0].number)

    async def cut() -> bool:
        rows = await world.pool.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))",
            other.get_server_pid(),
        )
        return bool(rows)

    try:
        await first.start(number, drain)
        assert len(first.assigned) == 8
        await second.start(number, drain)
        await until(lambda: drained, what="shards are to be given away")
        await until(cut, what="their release waits")
        await second.stop()
        await locked.rollback()
        events = await world.publish(200, keys=40)
        seen: set[uuid.UUID] = set()

        async def all_seen() -> bool:
            seen.update(record.event.event_id for record in await first.fetch(1000) if record.event is not None)
            return seen == {event.event_id for event in events}

        await until(all_seen, what="every shard is read")
    finally:
        await first.stop()
        await other.close()


async def test_a_shard_without_news_keeps_up_with_the_log(world: Any) -> None:
    """Else retention would wait for it, ticks would pile up, and its lag would grow, until an event for it came."""
    newest = "SELECT max(tick_id) FROM soma.ticks"
    slowest = "SELECT min(from_tick) FROM soma.shards WHERE reader = 'consumer:billing'"

    async def all_passed(tick: int) -> bool:
        return (await world.pool.fetch(slowest))[0][0] >= tick

    async with world.log_worker() as worker:
        events = await world.publish(4, keys=1)
        for _ in range(3):  # all keys are different ones: the shard of the first has no more news
            await world.applied(len(events))
            tick = (await world.pool.fetch(newest))[0][0]
            await until(lambda tick=tick: all_passed(tick), within=30, what=f"every shard at tick {tick}")
            await until(lambda: set(worker.stats().lag.values()) == {0}, within=30, what="no lag")
            events += await world.publish(1, start=len(events), keys=97)
        await world.applied(len(events))
    await world.check(events)
