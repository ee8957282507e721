"""Replaying the log: what was missed is applied once, what is known is passed over, and nothing goes ahead of live."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from soma_common.consumer.handlers import Handlers
from soma_common.errors import (
    DatabaseUnavailable,
    HandlerFailed,
    ReplayRefused,
    SomaError,
    ValidationError,
)
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres import migrate
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.applying import Batches
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.engine import ReplayEngine
from soma_common.replay.models import ReplayFilter, ReplayState
from soma_common.replay.running import Runner
from soma_common.retry import Backoff
from tests.integration.consumer.conftest import apply
from tests.integration.replay.conftest import nothing


async def test_what_was_missed_is_applied_once_and_in_order(replays: Any) -> None:
    events = await replays.publish(700, keys=13)
    await replays.passed_by()
    lost = await replays.forget("e.position % 3 = 0")
    async with replays.engine() as engine:
        plan = await engine.plan(replays.everything)
        assert (plan.total, plan.total - plan.known) == (700, lost)
        run = await engine.start(replays.everything)
        seen = [progress async for progress in engine.run(run.run_id)]
        assert seen[-1].state is ReplayState.DONE
        assert (seen[-1].counts.read, seen[-1].counts.applied, seen[-1].counts.repeated) == (700, lost, 700 - lost)
        assert [p.counts.read for p in seen] == sorted(p.counts.read for p in seen)
        assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
        assert seen[-1].fraction == 1.0
        again = await replays.finish(engine, await engine.start(replays.everything))
        assert (again.counts.applied, again.counts.repeated) == (0, 700)
    rows = await replays.effects()
    assert len(rows) == 700
    assert {row[0] for row in rows} == {event.event_id for event in events}
    restored = [row[3] for row in rows[-lost:]]
    assert restored == sorted(restored)


async def test_a_handler_that_came_later_gets_the_past(replays: Any) -> None:
    await replays.publish(60, event_type="order.paid")
    await replays.publish(40, event_type="order.shipped")
    await replays.passed_by(nothing, "order.paid")
    async with replays.engine(apply, "order.shipped") as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
    assert (done.counts.applied, done.counts.skipped, done.counts.repeated) == (40, 60, 0)
    assert await replays.count() == 40


async def test_a_replay_never_goes_ahead_of_the_live_consumer(replays: Any) -> None:
    await replays.publish(50)
    await replays.passed_by()
    await replays.forget()
    await replays.publish(30, start=50)
    async with replays.engine() as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
        assert done.counts.read == 50
    async with replays.log_worker():
        await replays.applied(80)
    numbers = [row[3] for row in await replays.effects()]
    assert numbers[:50] == list(range(50))
    assert sorted(numbers) == list(range(80))


async def test_the_slowest_shard_bounds_a_replay(replays: Any) -> None:
    await replays.publish(50)
    await replays.passed_by()
    before = await replays.pool.fetch("SELECT from_tick FROM soma.shards WHERE reader = 'consumer:billing' LIMIT 1")
    await replays.publish(50, start=50)
    await replays.passed_by()
    await replays.pool.fetch(
        "UPDATE soma.shards s SET from_tick = t.tick_id, from_token = t.token, to_tick = NULL, to_token = NULL "
        "FROM soma.ticks t WHERE t.tick_id = $1 AND s.reader = 'consumer:billing' AND s.shard = 5",
        before[0][0],
    )
    async with replays.engine() as engine:
        assert (await engine.plan(replays.everything)).total == 50


async def test_an_event_that_committed_late_is_not_left_out(replays: Any) -> None:
    """Its position is low, and the live consumer saw it last: the end tick tells, not the position."""
    async with replays.pool.connection() as slow:
        transaction = slow.transaction()
        await transaction.start()
        await replays.store.publish(
            Event(payload={"n": 0}, event_type="order.paid", tenant_id="acme", aggregate_id="slow"), tx=slow
        )
        await replays.publish(20, start=1)
        await replays.passed_by()
        async with replays.engine() as engine:
            assert (await engine.plan(replays.everything)).total == 20
        await transaction.commit()
    await replays.passed_by()
    await replays.forget()
    async with replays.engine() as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
    assert done.counts.applied == 21


@pytest.mark.parametrize(
    "wanted",
    [
        {"tenant_id": "acme"}, {"event_type": "order.shipped"}, {"aggregate_id": "a3"}, {"aggregate_type": "default"},
        {"service_id": "tests"}, {"service_id": "none"}, {"tenant_id": "acme", "event_type": "order.paid"},
        {"aggregate_id": "a1", "tenant_id": "globex"}, {"trace_id": "trace"}, {"since": 1, "until": 2}, {"until": 1},
    ],
)  # fmt: skip
async def test_filters(replays: Any, wanted: dict[str, Any]) -> None:
    events = await replays.publish(60)
    await asyncio.sleep(0.01)
    times = {1: datetime.now(UTC)}
    events += await replays.publish(40, event_type="order.shipped")
    await asyncio.sleep(0.01)
    times[2] = datetime.now(UTC)
    events += await replays.publish(30, tenant_id="globex")
    await replays.passed_by(nothing)
    await replays.forget()
    given = {name: times.get(value, value) for name, value in wanted.items()}
    if "trace_id" in given:
        given["trace_id"] = events[50].trace_id
    fits = [event for event in events if _fits(event, given)]
    async with replays.engine() as engine:
        wanted_filter = ReplayFilter(**({"tenant_id": ALL_TENANTS} | given))
        plan = await engine.plan(wanted_filter)
        assert plan.total == len(fits)
        assert sum(plan.by_type.values()) == sum(plan.by_service.values()) == sum(plan.by_day.values()) == len(fits)
        done = await replays.finish(engine, await engine.start(wanted_filter))
        assert done.counts.applied == len(fits)
        assert done.wanted == wanted_filter
    assert [row[0] for row in await replays.effects()] == [event.event_id for event in fits]


def _fits(event: Any, wanted: dict[str, Any]) -> bool:
    return all(
        event.timestamp >= value if name == "since" else event.timestamp < value if name == "until"
        else getattr(event, name) == value
        for name, value in wanted.items()
    )  # fmt: skip


async def test_force_applies_again_once_per_run_and_is_audited(replays: Any) -> None:
    await replays.publish(120)
    await replays.passed_by()
    async with replays.engine() as engine:
        for missing in ({}, {"requested_by": "ann"}, {"reason": "why"}, {"requested_by": " ", "reason": "x"}):
            with pytest.raises(ReplayRefused, match="who wants it, and why"):
                await engine.start(replays.everything, "force", **missing)
        run = await engine.start(replays.everything, "force", requested_by="ann", reason="ticket 7")
        done = await replays.finish(engine, run)
        assert (done.counts.applied, done.requested_by, done.reason) == (120, "ann", "ticket 7")
        assert await replays.count() == 240
        # What it applied, the inbox knows: a missing one afterwards adds nothing.
        await replays.pool.fetch("DELETE FROM soma.inbox")
        await replays.finish(engine, await engine.start(replays.everything, "force", requested_by="a", reason="b"))
        missing_run = await replays.finish(engine, await engine.start(replays.everything))
        assert (missing_run.counts.applied, missing_run.counts.repeated) == (0, 120)


async def test_the_audit_is_not_the_applications_to_change(replays: Any) -> None:
    with pytest.raises(SomaError):
        await replays.pool.fetch(
            "SELECT soma.open_replay(gen_random_uuid(), 1, 1, 'force', 'log', '{}', NULL, 0, 0, 1, 1, NULL, '', '')"
        )


async def test_a_handler_knows_that_it_is_a_replay(replays: Any) -> None:
    seen: list[tuple[bool, bool]] = []

    async def handle(event: Any, ctx: Any) -> None:
        seen.append((ctx.delivery.replaying, ctx.delivery.external_effects))

    await replays.publish(1)
    await replays.passed_by(handle)
    await replays.forget()
    async with replays.engine(handle) as engine:
        await replays.finish(engine, await engine.start(replays.everything))
    assert seen == [(False, True), (True, True)]


async def test_the_horizon_of_the_inbox(replays: Any) -> None:
    await replays.publish(5)
    await asyncio.sleep(0.01)
    later = await replays.publish(5, start=5)
    await replays.passed_by()
    horizon = later[0].timestamp
    async with replays.engine() as engine:
        await engine.raise_horizon(horizon)
        await engine.raise_horizon(horizon - timedelta(days=1))  # forward only
        for since in (None, horizon - timedelta(microseconds=1)):
            with pytest.raises(ReplayRefused, match="is whole since"):
                await engine.start(ReplayFilter(tenant_id="acme", since=since))
        assert (await engine.plan(ReplayFilter(tenant_id="acme", since=horizon))).total == 5
        await engine.start(replays.everything, "force", requested_by="ann", reason="it may")
        with pytest.raises(ValidationError):
            await engine.raise_horizon(datetime(2026, 1, 1))


async def test_a_horizon_that_is_raised_meanwhile_ends_the_run_without_a_second_effect(replays: Any) -> None:
    """Retention commits the horizon, then deletes: the batch that finds rows gone must not apply them."""
    await replays.publish(200)
    await replays.passed_by()
    async with replays.engine(batch=20, page=20) as engine:
        run = await engine.start(replays.everything)
        with pytest.raises(ReplayRefused, match="cleaned beyond"):
            async for _ in engine.run(run.run_id):
                await engine.raise_horizon(datetime.now(UTC))
                await replays.pool.fetch("DELETE FROM soma.inbox")
        assert (await engine.progress(run.run_id)).state is ReplayState.FAILED
    assert await replays.count() == 200


async def test_a_failing_event_ends_the_run_there_and_resume_goes_on(replays: Any) -> None:
    broken = True

    async def handle(event: Any, ctx: Any) -> None:
        if broken and event.payload["n"] == 77:
            raise ValueError("bad luck")
        await apply(event, ctx)

    await replays.publish(150)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(handle) as engine:
        run = await engine.start(replays.everything)
        with pytest.raises(HandlerFailed, match="bad luck"):
            await replays.finish(engine, run)
        failed = await engine.progress(run.run_id)
        assert failed.state is ReplayState.FAILED
        assert "bad luck" in (failed.error or "")
        assert [row[3] for row in await replays.effects()] == list(range(77))
        with pytest.raises(ReplayRefused, match="is failed: .*bad luck"):
            await replays.finish(engine, run)
        broken = False
        await engine.resume(run.run_id)
        done = await replays.finish(engine, run)
        assert (done.state, done.error, done.counts.read) == (ReplayState.DONE, None, 150)
    assert [row[3] for row in await replays.effects()] == list(range(150))


async def test_what_handlers_publish_commits_with_the_batch(replays: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        ctx.publish(Event(payload={}, event_type="order.seen", tenant_id="acme", aggregate_id="x"))

    await replays.publish(5)
    await replays.passed_by(nothing)
    await replays.forget()
    async with replays.engine(handle, "order.paid") as engine:
        await replays.finish(engine, await engine.start(replays.everything))
        await replays.finish(engine, await engine.start(replays.everything))
    assert len(await replays.store.query(tenant_id="acme", event_type="order.seen")) == 5


async def test_a_lost_answer_to_a_commit_while_the_database_stays_away(replays: Any) -> None:
    """The batch took effect, nobody heard of it, and the first looks at the cursor fail: nothing is applied twice."""
    lost: list[str] = []

    class Deaf(Batches):
        async def apply(self, run: Any, records: Any) -> Any:
            counts = await super().apply(run, records)
            if len(lost) == 0:
                lost.append("answer")
                raise DatabaseUnavailable
            return counts

    class Away(Checkpoints):
        async def claim(self, run_id: Any, owner: Any) -> Any:
            if 0 < len(lost) < 4:
                lost.append("claim")
                raise DatabaseUnavailable
            return await super().claim(run_id, owner)

    await replays.publish(100)
    await replays.passed_by(nothing)
    async with replays.engine() as engine:
        planned = await engine.start(replays.everything, "force", requested_by="t", reason="t")
        checkpoints, owner = Away(engine._pool), uuid4()
        run = await checkpoints.claim(planned.run_id, owner)
        made = engine._batches(run)
        batches = Deaf(engine._pool.transaction, checkpoints, made._effects, made._inbox, made._delivery)
        runner = Runner(
            engine._pool, checkpoints, batches, run, owner, batch=20, page=40, backoff=Backoff(base=0.01, maximum=0.01)
        )
        done = [progress async for progress in runner.steps()][-1]
    assert lost == ["answer", "claim", "claim", "claim"]
    assert (done.state, done.counts.read) == (ReplayState.DONE, 100)
    assert [row[3] for row in await replays.effects()] == list(range(100))


async def test_the_runtime_role_replays_and_cannot_rewrite_the_audit(replays: Any) -> None:
    role = "soma_app_" + replays.dsn[-8:]
    await replays.publish(30)
    await replays.passed_by(nothing)
    await replays.forget()
    await replays.pool.fetch(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        await migrate.upgrade(replays.dsn, grant_to=role)
        await replays.pool.fetch(f"GRANT ALL ON effect, effect_seq_seq TO {role}")
        mine = PoolSettings(re.sub(r"//[^@]+@", f"//{role}:pw@", replays.dsn))
        handlers = Handlers()
        handlers.add(apply, "order.paid")
        async with ReplayEngine(mine, "billing", handlers=handlers) as engine, Pool(mine) as pool:
            done = await replays.finish(engine, await engine.start(replays.everything, requested_by="ann"))
            assert done.counts.applied == 30
            for statement in ("UPDATE soma.replays SET requested_by = 'bob'", "DELETE FROM soma.replays"):
                with pytest.raises(SomaError, match="permission|right|grant"):
                    await pool.fetch(statement)
    finally:
        await replays.pool.fetch(f"DROP OWNED BY {role}")
        await replays.pool.fetch(f"DROP ROLE {role}")


async def test_a_replay_goes_through_the_eras_of_a_restored_database(replays: Any) -> None:
    await replays.publish(50)
    await replays.passed_by()
    await replays.pool.fetch("SELECT * FROM soma.repair()")
    await replays.publish(50, start=50)
    await replays.passed_by()
    await replays.forget()
    async with replays.engine() as engine:
        assert (await engine.plan(replays.everything)).total == 100
        done = await replays.finish(engine, await engine.start(replays.everything))
        assert done.counts.applied == 100
    assert [row[3] for row in await replays.effects()] == list(range(100))


async def test_ticks_of_an_open_run_are_not_merged(replays: Any) -> None:
    await replays.publish(20)
    await replays.passed_by()
    await replays.forget()
    async with replays.engine() as engine:
        run = await engine.start(replays.everything)
        for start in (20, 21, 22):
            await replays.publish(1, start=start)
            await replays.passed_by()
        await replays.pool.fetch("SELECT soma.merge_ticks(10000, '0')")
        done = await replays.finish(engine, run)
        assert done.counts.applied == 20
        assert (await replays.pool.fetch("SELECT soma.merge_ticks(10000, '0')"))[0][0] > 0
