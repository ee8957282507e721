"""Pausing, going on, cancelling: a run has one process, and keeps its rate."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.errors import (
    LeaseLost,
    ReplayRefused,
)
from soma_common.replay.models import ReplayState
from tests.integration.consumer.conftest import apply
from tests.integration.replay.conftest import nothing


async def test_pause_resume_cancel(replays: Any) -> None:
    await replays.publish(200)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(batch=20) as engine:
        run = await engine.start(replays.everything)
        states = []
        async for progress in engine.run(run.run_id):
            states.append(progress.state)
            if len(states) == 3:
                await engine.pause(run.run_id)
        assert states == [ReplayState.RUNNING] * 3 + [ReplayState.PAUSED]
        assert await replays.count() == 60
        with pytest.raises(ReplayRefused, match="is paused"):
            await replays.finish(engine, run)
        with pytest.raises(ReplayRefused, match="cannot become"):
            await engine.pause(run.run_id)
        await engine.resume(run.run_id)
        steps = engine.run(run.run_id)
        await anext(steps)
        assert (await engine.cancel(run.run_id)).state is ReplayState.CANCELLED
        rest = [progress.state async for progress in steps]
        assert rest == [ReplayState.CANCELLED]
        assert await replays.count() == 80
        for verb in (engine.pause, engine.resume, engine.cancel):
            with pytest.raises(ReplayRefused, match="is cancelled"):
                await verb(run.run_id)
    assert await replays.pool.fetch("SELECT FROM soma.shards WHERE reader LIKE 'replay:%'") == []


async def test_after_pause_returned_nothing_more_takes_effect(replays: Any) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 30:
            inside.set()
            await go_on.wait()

    await replays.publish(100)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(handle, batch=20) as engine:
        run = await engine.start(replays.everything)
        running = asyncio.create_task(replays.finish(engine, run))
        await inside.wait()
        paused = await engine.pause(run.run_id)
        go_on.set()
        assert (await running).state is ReplayState.PAUSED
        assert await replays.count() == paused.counts.read == 20


async def test_one_run_has_one_process(replays: Any) -> None:
    await replays.publish(100)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(batch=20) as engine, replays.engine(batch=20) as other:
        run = await engine.start(replays.everything)
        steps = engine.run(run.run_id)
        await anext(steps)
        with pytest.raises(ReplayRefused, match="is running"):
            await replays.finish(other, run)
        # The lease of a silent process ends: another goes on, and the first one's next batch is refused.
        await replays.pool.fetch("UPDATE soma.replays SET leased_until = '-infinity'")
        theirs = other.run(run.run_id)
        await anext(theirs)
        with pytest.raises(LeaseLost):
            await anext(steps)
        async for _ in theirs:
            pass
    assert [row[3] for row in await replays.effects()] == list(range(100))


async def test_who_leaves_the_loop_leaves_the_run(replays: Any) -> None:
    await replays.publish(100)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(batch=20) as engine:
        run = await engine.start(replays.everything)
        steps = engine.run(run.run_id)
        await anext(steps)
        await steps.aclose()
        await replays.finish(engine, run)
    assert [row[3] for row in await replays.effects()] == list(range(100))


async def test_a_slow_batch_keeps_its_run(replays: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        await asyncio.sleep(0.5)

    await replays.publish(3)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(handle, lease=0.3) as engine, replays.engine(lease=0.3) as other:
        run = await engine.start(replays.everything)
        running = asyncio.create_task(replays.finish(engine, run))
        await asyncio.sleep(0.8)
        with pytest.raises(ReplayRefused, match="is running"):
            await replays.finish(other, run)
        assert (await running).state is ReplayState.DONE


async def test_the_rate_is_kept(replays: Any) -> None:
    await replays.publish(60)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(batch=10) as engine:
        run = await engine.start(replays.everything, rate=50.0)
        begin = asyncio.get_running_loop().time()
        await replays.finish(engine, run)
        assert asyncio.get_running_loop().time() - begin >= 0.95  # the first ten at once, fifty within a second
