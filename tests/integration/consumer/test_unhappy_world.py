"""What a consumer does when its letters cannot be written, clocks jump, or a handler returns nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from soma_common.consumer.handlers import Handlers
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import ConfigurationError, DeadLetterRefused
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from tests.integration.consumer.conftest import World
from tests.waiting import until

_REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'the shelf of letters is full' USING ERRCODE = 'P0001'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON soma.dead_letters FOR EACH STATEMENT EXECUTE FUNCTION refuse();
"""


async def _run(world: Any, sql: str) -> None:
    async with world.pool.connection() as connection:
        await connection.execute(sql)


@pytest.mark.parametrize("gone", [False, True], ids=["refuses", "is gone"])
@pytest.mark.parametrize("source", ["log", "kafka"])
async def test_letters_that_cannot_be_written(
    world: Any, topic: Any, apply: Any, settings: Any, source: str, gone: bool
) -> None:
    """Both errors are raised, and the event stays where it is: nothing is lost, nothing goes past it."""

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 7:
            raise ValueError("the seventh is bad")

    events = await world.publish(20, keys=4)
    await topic.produce(events)

    def worker() -> ConsumerWorker:
        one_lane = settings(lanes=1)
        if source == "log":
            made: ConsumerWorker = world.log_worker(handle, settings=one_lane)
        else:
            made = world.worker(topic.source(world.pool), handle, settings=one_lane)
        return made

    await _run(world, "ALTER TABLE soma.dead_letters RENAME TO put_away" if gone else _REFUSING)
    for _ in range(2):
        running = worker()
        await running.start()
        with pytest.raises(Exception, match="letter") as caught:
            await asyncio.wait_for(running.wait(), 60.0)
        with pytest.raises(type(caught.value)):
            await running.stop()
    if not gone:
        assert isinstance(caught.value, DeadLetterRefused)
        assert "the seventh is bad" in str(caught.value)
        assert "the shelf of letters is full" in str(caught.value)
        assert await world.count() < 20
        await _run(world, "DROP TRIGGER refuse ON soma.dead_letters")
    else:
        await _run(world, "ALTER TABLE soma.put_away RENAME TO dead_letters")
    async with worker() as again:
        await until(lambda: again.stats().tally.dead == 1)
        await until(lambda: again.stats().tally.blocked == 3)
        await world.applied(16)
    letters = await world.letters()
    assert [letter.letter.event.event_id for letter in letters] == [event.event_id for event in events[7::4]]
    await world.check([event for event in events if event.payload["n"] not in (7, 11, 15, 19)])


@pytest.mark.parametrize("jump", ["-1 hour", "1 hour"])
async def test_the_databases_clock_jumps_between_workers(world: Any, apply: Any, jump: str) -> None:
    """Leases and due times are the database's: a worker whose server has another time re-drives nothing twice."""
    failing = {"n": 3}

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] % 5 == failing.get("n"):
            raise ValueError("not yet")

    parked = RedrivePolicy(tries=20, after=0.1)
    given = {"retry": RetryPolicy(tries=1, parked=parked), "redrive_every": 0.05}
    events = await world.publish(100, keys=20)
    async with Pool(PoolSettings(world.dsn, settings={"soma.clock_offset": jump})) as elsewhere:
        other = World(elsewhere, world.dsn).log_worker(handle, settings=ConsumerSettings(**given))
        async with world.log_worker(handle, settings=ConsumerSettings(**given)), other:
            await until(lambda: _failed(world, 4))  # not by what they counted: each takes the other's leases
            events += await world.publish(100, keys=20, start=100)
            failing.clear()

            async def all_applied() -> bool:
                await _make_due(world)
                return bool(await world.count() >= 200)

            await until(all_applied)
    await world.check(events)
    assert {letter.letter.status for letter in await world.letters()} == {"resolved"}


async def _failed(world: Any, count: int) -> bool:
    return sum(letter.letter.status != "blocked" for letter in await world.letters()) == count


async def _make_due(world: Any) -> None:
    """What an operator does after a clock that was ahead has been set: nothing waits for the hour that is not there."""
    for letter in await world.letters():
        if letter.letter.status == "retrying":
            await world.dlq.retry_event(letter.letter.letter_id)


async def test_a_clock_that_is_ahead_of_the_databases_makes_the_consumer_wait(world: Any, apply: Any) -> None:
    """What a handler publishes is refused while the process's clock is far ahead: no event is to blame for that."""
    clock = {"soma.clock_offset": "-1 hour"}  # seen from the database, this process is an hour ahead

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        ctx.publish(Event(tenant_id="acme", event_type="order.seen", aggregate_id="x", payload={}))

    events = await world.publish(5)
    async with Pool(PoolSettings(world.dsn, settings=clock)) as behind:
        settings = ConsumerSettings(backoff=Backoff(base=0.05, maximum=0.1))
        worker = World(behind, world.dsn).log_worker(handle, settings=settings)
        async with worker:
            await until(lambda: worker.stats().tally.transactions >= 3)
            assert worker.stats().tally.dead == worker.stats().tally.parked == 0
    assert not await world.letters()
    assert await world.count() == 0
    async with world.log_worker(apply, "order.paid"):
        await world.applied(5)
    await world.check(events)


@pytest.mark.parametrize("said", [42, "done", ValueError("not raised"), object(), [1, 2], {"ok": False}, False])
async def test_what_a_handler_returns_is_ignored(world: Any, apply: Any, said: object) -> None:
    async def handle(event: Any, ctx: Any) -> object:
        await apply(event, ctx)
        return said

    events = await world.publish(10)
    async with world.log_worker(handle):
        await world.applied(10)
    await world.check(events)
    assert not await world.letters()


async def _later(event: Any, ctx: Any) -> None:
    """Called and never awaited."""


def _steps() -> Iterator[int]:
    yield 1


async def _async_steps() -> AsyncIterator[int]:
    yield 1


_UNDONE = [
    lambda event, ctx: _later(event, ctx),
    lambda event, ctx: _steps(),
    lambda event, ctx: _async_steps(),
    lambda event, ctx: asyncio.get_running_loop().create_future(),
]


@pytest.mark.parametrize("undone", _UNDONE, ids=["coroutine", "generator", "async generator", "future"])
@pytest.mark.parametrize("batch", [False, True])
async def test_work_that_nobody_would_do_is_a_failure(world: Any, undone: Any, batch: bool) -> None:
    """A forgotten ``await`` must not pass for an effect."""

    async def handle(event: Any, ctx: Any) -> Any:
        return undone(event, ctx)

    await world.publish(1)
    async with world.log_worker(handle, batch=batch) as worker:
        await until(lambda: worker.stats().tally.dead == 1)
    (letter,) = await world.letters()
    assert "its effects never happened" in letter.message


async def test_generators_are_refused_as_handlers() -> None:
    async def one(event: Any, ctx: Any) -> Any:
        yield 1

    def other(event: Any, ctx: Any) -> Any:
        yield 1

    class Callable:
        def __call__(self, event: Any, ctx: Any) -> Any:
            yield 1

    for handle in (one, other, Callable()):
        with pytest.raises(ConfigurationError, match="is a generator"):
            Handlers(None).add(handle, "*")
