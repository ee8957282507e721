"""Replays beside open dead letters, whichever the consumer orders by; and beside what is away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from soma_common.consumer.settings import ConsumerSettings
from soma_common.errors import BrokerUnavailable, HandlerFailed
from soma_common.replay.models import ReplayState
from tests.integration.consumer.conftest import AT_ONCE, apply
from tests.integration.replay.test_rebuild_letters import settled
from tests.waiting import until


class Flaky:
    """``apply``, but for a number that is broken."""

    def __init__(self, broken: int) -> None:
        self.broken: int | None = broken

    async def __call__(self, event: Any, ctx: Any) -> None:
        if event.payload["n"] == self.broken:
            raise ValueError(f"{self.broken} is broken")
        await apply(event, ctx)


@pytest.mark.parametrize(("order", "held"), [("key", 5), ("partition", 20), ("none", 1)])
async def test_what_waits_for_a_re_drive_is_left_to_it(replays: Any, order: str, held: int) -> None:
    """Applied by the replay as well, its effect would happen twice."""
    flaky = Flaky(5)
    await replays.publish(20, keys=4)
    settings = ConsumerSettings(retry=AT_ONCE, redrive_every=0.05, order=order)  # type: ignore[arg-type]  # by its word
    async with replays.log_worker(flaky, settings=settings, shards=1) as worker:
        await settled(replays, worker, 20)
        waiting = {letter.letter.event.event_id for letter in await replays.letters()}
        async with replays.engine(apply) as engine:
            run = await engine.start(replays.everything, "force", requested_by="ann", reason="ticket 7")
            done = await replays.finish(engine, run)
        assert (done.counts.held, done.counts.applied) == (held, 20 - held)
        flaky.broken = None
        for letter in await replays.letters():
            if letter.letter.status == "dead":
                await replays.dlq.retry_event(letter.letter.letter_id)
        await until(lambda: _none_open(replays), what="the letters settled")
    times = Counter(row[0] for row in await replays.effects())
    assert len(times) == 20
    assert all(times[event] == 1 for event in waiting)


async def test_the_same_from_kafka(replays: Any, topic: Any) -> None:
    await topic.produce(await replays.publish(40, keys=8))
    settings = ConsumerSettings(retry=AT_ONCE, order="partition")  # type: ignore[arg-type]  # by its word
    flaky = Flaky(5)
    async with replays.worker(topic.source(replays.pool), flaky, settings=settings) as worker:
        await until(lambda: worker.stats().tally.settled >= 40, what="40 settled records")
    waiting = {letter.letter.event.event_id for letter in await replays.letters()}
    await replays.pool.fetch("TRUNCATE effect")
    await replays.forget()
    async with replays.engine(apply, bootstrap=topic.bootstrap) as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
    assert done.counts.held >= len(waiting) > 0
    assert not waiting & {row[0] for row in await replays.effects()}


async def _none_open(replays: Any) -> bool:
    return not await replays.pool.fetch("SELECT FROM soma.dead_sequences")


async def test_what_a_handler_needs_is_away(replays: Any) -> None:
    """It is waited for, as the live consumer does; no event is to blame."""
    asked = []

    async def calls(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 7 and len(asked) < 3:
            asked.append(event)
            raise BrokerUnavailable("No broker answers.")
        await apply(event, ctx)

    events = await replays.publish(20)
    await replays.passed_by()
    await replays.forget()
    async with replays.engine(calls) as engine:
        assert (await replays.finish(engine, await engine.start(replays.everything))).state is ReplayState.DONE
    assert len(asked) == 3
    await replays.check(events)


async def test_what_a_handler_says_does_not_steer_a_terminal(replays: Any) -> None:
    async def quotes(event: Any, ctx: Any) -> None:
        raise ValueError("\x1b[2J\u202e\nsecond line " + "x" * 100_000)

    await replays.publish(3)
    await replays.passed_by()
    await replays.forget()
    async with replays.engine(quotes) as engine:
        run = await engine.start(replays.everything)
        with pytest.raises(HandlerFailed) as failed:
            await replays.finish(engine, run)
        told = (await engine.progress(run.run_id)).error
    assert told == failed.value.message
    assert all(c.isprintable() or c == "\n" for c in told)
    assert len(told) < 3000
