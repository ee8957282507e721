"""Handlers that take too long, and make something else of their cancellation."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from tests.waiting import until


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("made_of_it", ["nothing", "another error"])
async def test_one_that_makes_something_else_of_its_cancellation_is_late_all_the_same(
    world: Any, apply: Any, settings: Any, made_of_it: str, batch: bool
) -> None:
    """Its event fails as one that took too long, and the next event that does so is cancelled too."""

    async def one(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 1:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if made_of_it == "another error":
                raise ValueError("not what happened")
        elif event.payload["n"] == 3:
            await asyncio.Event().wait()
        await apply(event, ctx)

    async def several(events: Any, ctx: Any) -> None:
        for event in events:
            await one(event, ctx)

    await world.publish(5, keys=5)
    handle: Any = several if batch else one
    async with world.log_worker(handle, settings=settings(timeout=0.3, lanes=1), batch=batch) as worker:
        await until(lambda: worker.stats().tally.dead == 2)
        await world.applied(3)
        assert worker.stats().tally.timeouts == 2
    letters = await world.letters()
    assert {letter.letter.error_type for letter in letters} == {"soma_common.errors.HandlerTimeout"}
    assert [letter.letter.status for letter in letters] == ["dead", "dead"]
    assert await world.count() == 3


async def test_a_stop_is_not_taken_for_lateness(world: Any, apply: Any, settings: Any) -> None:
    """After a handler that was late and swallowed that, the next cancellation in its lane is what it is."""
    begun = asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        with suppress(asyncio.CancelledError) if event.payload["n"] == 0 else nullcontext():
            if event.payload["n"] == 1:
                begun.set()
            await asyncio.Event().wait()
        await apply(event, ctx)

    events = await world.publish(2, keys=2)
    async with world.log_worker(handle, settings=settings(timeout=2.0, lanes=1, drain=0.0, batch=1)):
        await asyncio.wait_for(begun.wait(), 60.0)
    async with world.log_worker():
        await until(lambda: world.count())
    assert [letter.letter.event.event_id for letter in await world.letters()] == [events[0].event_id]


async def test_one_that_was_left_behind_begins_nothing_more(world: Any, apply: Any, settings: Any) -> None:
    """Cancelled once, it went on and hung: when its session ends, that is no second lateness after which it begins
    another transaction, which nobody watches and all others wait for."""
    running = most = 0

    async def several(events: Any, ctx: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            for event in events:
                with suppress(asyncio.CancelledError):
                    await (asyncio.Event().wait() if event.payload["n"] in (1, 3) else asyncio.sleep(0))
                await apply(event, ctx)
        finally:
            running -= 1

    # The end of the session takes so long that whatever is left behind could begin anew.
    async with world.pool.connection() as connection:
        await connection.execute(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;"
            "CREATE TRIGGER slowly BEFORE DELETE ON soma.consumer_lanes FOR EACH STATEMENT EXECUTE FUNCTION slowly()"
        )
    await world.publish(5, keys=5)
    given = settings(timeout=0.3, idle_timeout=3600.0, lanes=1)
    async with world.log_worker(several, settings=given, batch=True) as worker:
        await until(lambda: worker.stats().tally.dead == 2)
        await world.applied(3)
    assert most == 1
    assert {letter.letter.error_type for letter in await world.letters()} == {"soma_common.errors.HandlerTimeout"}
