"""What a consumer says that it waits for, and when it does not wait any more."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import BrokerUnavailable
from soma_common.events.keys import kafka_key
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from tests.integration.consumer.conftest import World
from tests.waiting import until

QUICK = RetryPolicy(
    tries=3,
    backoff=Backoff(base=0.01, maximum=0.02),
    parked=RedrivePolicy(tries=0),
    away=Backoff(base=0.01, maximum=0.02),
)


@pytest.mark.parametrize("end", ["applied", "dead"])
async def test_it_waits_for_nothing_any_more_when_the_error_changes(world: Any, apply: Any, end: str) -> None:
    """What was away is back, and the event fails for a reason of its own before it is settled."""
    raised: list[Exception] = [BrokerUnavailable("no broker"), ValueError("an error of its own")]
    if end == "dead":
        raised += [ValueError("again")] * 2

    async def handle(event: Any, ctx: Any) -> None:
        if raised:
            raise raised.pop(0)
        await apply(event, ctx)

    await world.publish(1)
    worker = world.log_worker(handle, settings=ConsumerSettings(retry=QUICK))
    async with worker:
        await until(lambda: worker.stats().tally.settled == 1)
        assert (worker.stats().away, worker.stats().ready) == (None, True)
        assert worker.stats().tally.dead == (end == "dead")


async def test_it_waits_for_nothing_of_partitions_that_went_to_others(world: Any, apply: Any) -> None:
    events = await world.publish(20, keys=20)
    (there, *_) = [event for event in events if kafka_key(event.stream)[1] & 1]  # in the shard that will be given away

    async def handle(event: Any, ctx: Any) -> None:
        if event.event_id == there.event_id:
            raise BrokerUnavailable("no broker")
        await apply(event, ctx)

    settings = ConsumerSettings(retry=RetryPolicy(away=Backoff(base=0.05, maximum=0.1)))
    one = world.log_worker(handle, settings=settings, lease=1.0, shards=2)
    async with one:
        await until(lambda: one.stats().away)
        session = one._session
        async with world.log_worker(settings=settings, lease=1.0, shards=2):
            await world.applied(20)
            await until(lambda: len(one.source.assigned) == 1)
            assert one._session is session, "it went in good order"
            assert (one.stats().away, one.stats().ready) == (None, True)
    await world.check(events)


async def test_a_clock_that_is_ahead_is_what_the_consumer_waits_for(world: Any, apply: Any) -> None:
    """Nothing moves until somebody sets it, so it must be said."""
    clock = {"soma.clock_offset": "-1 hour"}  # seen from the database, this process is an hour ahead

    async def handle(event: Any, ctx: Any) -> None:
        ctx.publish(Event(tenant_id="acme", event_type="order.seen", aggregate_id="x", payload={}))

    await world.publish(3)
    async with Pool(PoolSettings(world.dsn, settings=clock)) as behind:
        worker = World(behind, world.dsn).log_worker(handle, settings=ConsumerSettings(retry=QUICK))
        async with worker:
            await until(lambda: worker.stats().away, within=20.0)
            assert "clock" in str(worker.stats().away)
            assert not worker.stats().ready
    assert not await world.letters()
