"""A topic that was deleted and made anew while a replay or a rebuild of it is not over."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.errors import ReplayRefused
from soma_common.replay.models import ReplayState
from tests.integration.consumer.test_topic_made_anew import make_anew
from tests.integration.replay.projecting import BOTH, book, make_tables, schemas
from tests.integration.replay.test_replay_kafka import consumed


@pytest.mark.parametrize("more", [0, 300])
async def test_neither_replayed_nor_rebuilt(replays: Any, topic: Any, more: int) -> None:
    """With as many records as before, the offsets alone would tell nothing: new tables would lack all that was."""
    await make_tables(replays)
    await topic.produce(await replays.publish(100, keys=30))
    await consumed(replays, topic, 100, book)
    async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything)
        rebuild = await engine.start(replays.everything, "rebuild", projection=BOTH)
        await replays.finish(engine, rebuild, swap=False)
        await make_anew(topic)
        await topic.produce(await replays.publish(more, keys=30, start=100))
        for one in (run, rebuild):
            with pytest.raises(ReplayRefused, match="made anew"):
                await replays.finish(engine, one)
            assert (await engine.progress(one.run_id)).state is ReplayState.FAILED
        await engine.cancel(rebuild.run_id)
        for mode, projection in (("missing", None), ("rebuild", BOTH)):
            with pytest.raises(ReplayRefused, match="made anew"):
                await engine.start(replays.everything, mode, projection=projection)
    assert await replays.count() == 100
    assert await schemas(replays) == []


async def test_offsets_that_are_not_there_are_no_broker_that_is_away(replays: Any, topic: Any) -> None:
    """Nobody knows the id of the former topic: an old broker, or somebody has set the consumer back."""
    await topic.produce(await replays.publish(100, keys=1))
    await consumed(replays, topic, 100)
    async with replays.engine(bootstrap=topic.bootstrap, page=20, batch=20) as engine:
        run = await engine.start(replays.everything)
        async for progress in engine.run(run.run_id):
            if progress.counts.read >= 40:
                break
        await make_anew(topic)
        await replays.pool.fetch("UPDATE soma.consumer_offsets SET topic_id = NULL")
        with pytest.raises(ReplayRefused, match="it ends at 0"):
            await replays.finish(engine, run)
        assert (await engine.progress(run.run_id)).state is ReplayState.FAILED


async def test_a_consumer_that_was_set_back_under_a_run(replays: Any, topic: Any) -> None:
    await make_tables(replays)
    await topic.produce(await replays.publish(100, keys=30))
    await consumed(replays, topic, 100, book)
    async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything)
        rebuild = await engine.start(replays.everything, "rebuild", projection=BOTH)
        await replays.finish(engine, rebuild, swap=False)
        await replays.pool.fetch("UPDATE soma.consumer_offsets SET next_offset = 0")
        for one in (run, rebuild):
            with pytest.raises(ReplayRefused, match="went back to 0"):
                await replays.finish(engine, one)
        await engine.cancel(rebuild.run_id)
    assert await replays.count() == 100
