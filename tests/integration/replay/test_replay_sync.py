"""Replays to handlers that are plain functions."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from soma_common.consumer.handlers import EVERY_TYPE, Handlers
from soma_common.errors import HandlerFailed
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import ReplayState
from tests.integration.consumer.flavours import apply, flavour_of
from tests.waiting import until


@pytest.fixture(params=["psycopg", "django"])
def flavour(request: pytest.FixtureRequest, soma_database: str) -> Any:
    with flavour_of(request.param, soma_database) as made:
        yield made


def engine_of(replays: Any, flavour: Any, handle: Any) -> ReplayEngine:
    handlers = Handlers()
    handlers.add(handle, EVERY_TYPE)
    return ReplayEngine(
        replays.pool.settings, "billing", handlers=handlers, connect=flavour.connect,
        append=lambda events, tx: replays.store.publish(events, tx=tx), settings=ReplaySettings(batch=50, page=120),
    )  # fmt: skip


async def test_what_was_missed_is_applied_once_and_in_order(replays: Any, flavour: Any) -> None:
    events = await replays.publish(400, keys=13)
    await replays.passed_by()
    lost = await replays.forget("e.position % 3 = 0")
    loop = threading.get_native_id()
    deliveries = set()

    def handle(event: Any, ctx: Any) -> None:
        deliveries.add(ctx.delivery.replaying)
        assert threading.get_native_id() != loop
        apply(event, ctx)

    async with engine_of(replays, flavour, handle) as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
        assert done.state is ReplayState.DONE
        assert (done.counts.applied, done.counts.repeated) == (lost, 400 - lost)
    rows = await replays.effects()
    assert {row[0] for row in rows} == {event.event_id for event in events}
    assert len(rows) == 400
    assert deliveries == {True}


async def test_a_failing_event_stops_it_and_it_goes_on_there(replays: Any, flavour: Any) -> None:
    await replays.publish(120, keys=7)
    await replays.passed_by()
    await replays.forget()
    broken = True

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if broken and event.payload["n"] == 70:
            raise ValueError("bad luck")

    async with engine_of(replays, flavour, handle) as engine:
        run = await engine.start(replays.everything)
        with pytest.raises(HandlerFailed, match="bad luck"):
            await replays.finish(engine, run)
        assert await replays.count() == 70
        broken = False
        await engine.resume(run.run_id)
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    assert [row[3] for row in await replays.effects()] == list(range(120))


async def test_one_that_is_cancelled_in_a_handler_lets_go_at_once(replays: Any, flavour: Any) -> None:
    await replays.publish(30, keys=7)
    await replays.passed_by()
    await replays.forget()
    entered, over = threading.Event(), threading.Event()

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] == 10 and not over.is_set():
            entered.set()
            over.wait()

    try:
        async with engine_of(replays, flavour, handle) as engine:
            run = await engine.start(replays.everything)
            running = asyncio.create_task(replays.finish(engine, run))
            await until(entered.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            async with asyncio.timeout(25):  # idle_in_transaction_session_timeout is 30 s
                async with engine_of(replays, flavour, apply) as other:
                    assert (await replays.finish(other, run)).state is ReplayState.DONE
    finally:
        over.set()
    assert [row[3] for row in await replays.effects()] == list(range(30))
