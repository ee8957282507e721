"""A rebuild whose process is killed, at any point: the live tables are whole, and the next process ends it exactly."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from typing import Any

import psutil
import pytest

from soma_common.consumer.handlers import HandlerContext
from soma_common.errors import ReplayRefused
from soma_common.events.models import RecordedEvent
from soma_common.replay.models import ReplayState
from soma_common.replay.projection import Projection
from tests.sessions import SESSIONS
from tests.waiting import until

EVENTS = 400
TABLES = Projection(("effect", "total"))


async def wrong(event: RecordedEvent, ctx: HandlerContext) -> None:
    """What the live consumer did until now: it forgot the totals."""
    await ctx.tx.execute("INSERT INTO effect (event_id, number) VALUES ($1, -1)", event.event_id)


async def started(replays: Any) -> tuple[Any, list[RecordedEvent]]:
    events = await replays.publish(EVENTS, keys=7)
    await replays.passed_by(wrong)
    async with replays.engine() as engine:
        return await engine.start(replays.everything, "rebuild", projection=TABLES), events


def process(replays: Any, run: Any, **given: Any) -> subprocess.Popen[str]:
    arguments = {"dsn": replays.dsn, "run": str(run.run_id), "rebuild": True} | given
    child: subprocess.Popen[str] = replays.program(arguments)
    return child


async def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(child.communicate)
    return child.returncode, out, err


async def swapped(replays: Any) -> bool:
    return bool(await replays.pool.fetch("SELECT FROM soma.rebuilds WHERE swapped_at IS NOT NULL"))


async def untouched(replays: Any) -> None:
    """The live tables are as the live consumer left them."""
    rows = await replays.pool.fetch("SELECT count(*), min(number), max(number) FROM effect")
    assert tuple(rows[0]) == (EVENTS, -1, -1)
    assert await replays.pool.fetch("SELECT FROM total") == []


async def finished(replays: Any, run: Any, events: list[RecordedEvent]) -> None:
    """Another process brings it to its end; then every effect is there once, in order, and nothing is left over."""

    async def free() -> Any:
        return (await replays.pool.fetch("SELECT leased_until < soma.now() FROM soma.replays"))[0][0]

    if not await swapped(replays):
        await until(free, what="the end of the lease")
        assert (await ended(process(replays, run)))[:2] == (0, "done\n")
    async with replays.engine() as engine:
        found = await engine.progress(run.run_id)
        await engine.clean(run.run_id)
    assert found.state is ReplayState.DONE
    await replays.check(events)
    totals = await replays.pool.fetch("SELECT n FROM total")
    assert sum(row[0] for row in totals) == EVENTS
    assert not await replays.pool.fetch("SELECT FROM pg_namespace WHERE nspname LIKE 'soma\\_rebuild%'")
    assert await replays.pool.fetch("SELECT DISTINCT consumer_id FROM soma.inbox") == [(found.inbox_id,)]
    assert not await replays.pool.fetch("SELECT FROM soma.consumer_lanes WHERE consumer_id = $1", found.inbox_id)


POINTS = [("handler", 130), ("save", 2), ("saved", 3), ("committed", 4), ("check", 1), ("adopted", 1),
          ("swapped", 1), ("dropped", 1)]  # fmt: skip


@pytest.mark.parametrize(("stage", "after"), POINTS)
async def test_killed_at_each_stage(replays: Any, stage: str, after: int) -> None:
    run, events = await started(replays)
    code, _, err = await ended(process(replays, run, die={"stage": stage, "after": after}))
    assert code == -signal.SIGKILL, err
    assert await swapped(replays) is (stage in ("swapped", "dropped"))
    if not await swapped(replays):
        await untouched(replays)
    await finished(replays, run, events)


async def test_killed_at_ten_random_moments(replays: Any) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    run, events = await started(replays)
    for _ in range(10):
        stage = chance.choice(["handler", "save", "saved", "committed", "adopted", "moment"])
        given = {} if stage == "moment" else {"die": {"stage": stage, "after": chance.randint(1, 3)}}
        child = process(replays, run, page=chance.randint(5, 40), batch=1, lease=0.2, **given)
        if stage == "moment":
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            child.kill()
        code, _, err = await ended(child)
        # Or the lease of the one before has not ended yet, or all is done.
        assert code in (0, -signal.SIGKILL) or "ReplayRefused" in err, err
        if await swapped(replays):
            break
        await untouched(replays)
        await asyncio.sleep(0.2)
    await finished(replays, run, events)


async def test_a_paused_process_that_wakes_up_changes_nothing(replays: Any) -> None:
    run, events = await started(replays)
    child = process(replays, run, page=5, batch=1)

    async def some() -> Any:
        return (await replays.pool.fetch("SELECT read > 20 FROM soma.replays"))[0][0]

    await until(some)
    child.send_signal(signal.SIGSTOP)
    await replays.pool.fetch(
        f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} WHERE application_name = 'soma-replay' "
        "AND state LIKE 'idle in transaction%'"
    )  # as its timeout would
    await finished(replays, run, events)
    child.send_signal(signal.SIGCONT)
    code, _, err = await ended(child)
    assert code == 0 or "LeaseLost" in err, err
    await replays.check(events)


async def test_a_rebuild_that_was_killed_can_be_cancelled(replays: Any) -> None:
    run, events = await started(replays)
    code, _, err = await ended(process(replays, run, die={"stage": "handler", "after": 150}))
    assert code == -signal.SIGKILL, err
    async with replays.engine() as engine:
        with pytest.raises(ReplayRefused, match="is running"):
            await engine.start(replays.everything, "rebuild", projection=TABLES)
        assert (await engine.cancel(run.run_id)).state is ReplayState.CANCELLED
    await untouched(replays)
    assert not await replays.pool.fetch("SELECT FROM pg_namespace WHERE nspname LIKE 'soma\\_rebuild%'")
    assert not await replays.pool.fetch("SELECT FROM soma.inbox WHERE consumer_id = $1", run.inbox_id)
    async with replays.engine() as engine:
        again = await engine.start(replays.everything, "rebuild", projection=TABLES)
    assert (await ended(process(replays, again)))[:2] == (0, "done\n")
    await replays.check(events)


async def test_a_live_worker_that_was_stopped_through_the_swap(replays: Any) -> None:
    """Inside a batch it holds the swap up until PostgreSQL ends that; it wakes up into the new tables, and goes on."""
    events = await replays.publish(300, keys=7)
    live = replays.process(batch=10, slow=0.02, lease=0.6, idle=2.0)
    await replays.applied(150)
    live.send_signal(signal.SIGSTOP)
    other = replays.process(batch=50, lease=0.6, idle=2.0)  # takes its shards over
    await replays.applied(300)
    async with replays.engine() as engine:
        run = await engine.start(replays.everything, "rebuild", projection=TABLES)
    assert (await ended(process(replays, run)))[:2] == (0, "done\n")
    await replays.check(events)
    live.send_signal(signal.SIGCONT)
    owns = "SELECT FROM soma.shards WHERE owner LIKE $1 AND leased_until > soma.now()"
    await until(lambda: replays.pool.fetch(owns, f"%-{live.pid}-%"), what="the stopped one takes part again")
    events += await replays.publish(100, keys=7, start=300)
    await replays.applied(400)
    await replays.check(events)
    totals = await replays.pool.fetch("SELECT sum(n) FROM total")
    assert totals[0][0] == 400
    assert live.poll() is None
    assert other.poll() is None


async def test_a_rebuild_that_is_stopped_in_its_swap_holds_live_traffic_up_for_seconds_only(replays: Any) -> None:
    """It has the consumer's lock; PostgreSQL ends it, and it swaps later."""
    run, events = await started(replays)
    child = process(replays, run, die={"stage": "check", "after": 1, "stop": True})
    await until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, what="the swap")
    replays.process()
    events += await replays.publish(50, keys=7, start=EVENTS)
    await replays.applied(EVENTS + 50)
    child.send_signal(signal.SIGCONT)
    code, out, err = await ended(child)
    assert (code, out) == (0, "done\n"), err
    await replays.applied(EVENTS + 50)
    await replays.check(events)
