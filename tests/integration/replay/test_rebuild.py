"""Rebuilding tables: new ones fill beside the old, and take their place in one transaction."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.errors import HandlerFailed, ReplayRefused
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool
from soma_common.replay.models import ReplayState
from soma_common.replay.projection import Projection
from soma_common.replay.rebuilding import RebuildSettings
from tests.integration.replay.projecting import BOTH, SENT, book, make_tables, rebuilt, same_as_recomputed, schemas
from tests.sessions import WAITING_LOCKS
from tests.waiting import until


async def test_the_tables_are_made_anew_and_swapped(replays: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(900, keys=13)
    await replays.passed_by(book)
    await replays.pool.fetch("UPDATE balance SET total = total + 7")  # what a mended bug left behind
    await replays.pool.fetch("DELETE FROM effect WHERE number % 5 = 0")
    sent = list(SENT)
    shape = "SELECT soma.shape_of('public', ARRAY['effect', 'balance'])"
    before = await replays.pool.fetch(shape)
    done = await rebuilt(replays)
    assert (done.state, done.counts.applied, done.counts.repeated, done.fraction) == (ReplayState.DONE, 900, 0, 1.0)
    await same_as_recomputed(replays, events)
    assert sent == SENT, "a rebuild sends no mails"
    assert await replays.pool.fetch(shape) == before
    assert await replays.pool.fetch("SELECT reloptions FROM pg_class WHERE relname = 'balance'") == [
        (["fillfactor=70"],)
    ]
    assert await replays.pool.fetch("SELECT pg_get_serial_sequence('effect', 'seq')") == [("public.effect_seq_seq",)]
    inboxes = await replays.pool.fetch("SELECT DISTINCT consumer_id FROM soma.inbox")
    assert [row[0] for row in inboxes] == [done.inbox_id], "the old inbox is cleaned away"
    assert await schemas(replays) == []
    events += await replays.publish(100, keys=13, start=900)
    await replays.passed_by(book)
    await same_as_recomputed(replays, events)
    assert set(SENT) - set(sent) == {event.event_id for event in events[900:]}
    assert (await rebuilt(replays)).counts.applied == 1000
    await same_as_recomputed(replays, events)


async def test_events_beyond_the_stored_position_are_neither_lost_nor_doubled(replays: Any) -> None:
    """The live consumer has applied them, and its position does not say so yet."""
    await make_tables(replays)
    events = await replays.publish(300, keys=7)
    await replays.passed_by(book)
    stored = await replays.pool.fetch("SELECT shard, from_tick, from_token FROM soma.shards WHERE reader LIKE 'cons%'")
    events += await replays.publish(100, keys=7, start=300)
    await replays.passed_by(book)
    for shard, tick, token in stored:
        await replays.pool.fetch(
            "UPDATE soma.shards SET from_tick = $2, from_token = $3, to_tick = NULL, to_token = NULL, after_position = 0 "
            "WHERE reader = 'consumer:billing' AND shard = $1", shard, tick, token,
        )  # fmt: skip
    events += await replays.publish(50, keys=7, start=400)  # those nobody has applied
    done = await rebuilt(replays)
    assert done.counts.applied == 400
    await same_as_recomputed(replays, events[:400])
    await replays.passed_by(book)
    await same_as_recomputed(replays, events)
    assert len(set(SENT)) == 450, "each event's mail was sent"


async def test_what_handlers_publish_is_published_once(replays: Any) -> None:
    async def echo(event: Any, ctx: Any) -> None:
        if event.event_type == "order.paid":
            await book(event, ctx)
            ctx.publish(Event(payload=event.payload, event_type="order.echo", tenant_id="acme", aggregate_id="e"))

    await make_tables(replays)
    events = await replays.publish(40)
    await replays.passed_by(echo)
    done = await rebuilt(replays, echo)
    assert done.counts.read == 80
    await same_as_recomputed(replays, events)
    assert len(await replays.store.query(tenant_id="acme", event_type="order.echo", limit=100)) == 40


async def test_new_tables_of_another_shape(replays: Any) -> None:
    """The new version of a handler writes to tables of its own making, under the same names."""

    async def newer(event: Any, ctx: Any) -> None:
        await ctx.tx.execute(
            "INSERT INTO balance (key, total, most) VALUES ($1, $2, $2) ON CONFLICT (key) DO UPDATE "
            "SET total = balance.total + excluded.total, most = greatest(balance.most, excluded.most)",
            str(event.stream), event.payload["n"],
        )  # fmt: skip

    await make_tables(replays)
    await replays.publish(60, keys=3)
    await replays.passed_by(book)
    await replays.pool.fetch("GRANT SELECT ON balance TO PUBLIC")
    create = "CREATE TABLE balance (key text PRIMARY KEY, total bigint, most bigint); CREATE INDEX ON balance (most);"
    done = await rebuilt(replays, newer, Projection(("balance",), create=create))
    assert done.state is ReplayState.DONE
    rows = await replays.pool.fetch("SELECT total, most FROM balance ORDER BY key")
    assert [tuple(row) for row in rows] == [(sum(range(k, 60, 3)), 57 + k) for k in range(3)]
    assert await replays.pool.fetch("SELECT has_table_privilege('public', 'balance', 'SELECT')") == [(True,)]


async def test_a_failing_event_ends_it_and_it_goes_on_after_the_fix(replays: Any) -> None:
    async def broken(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 33:
            raise ValueError("33 is too much")
        await book(event, ctx)

    await make_tables(replays)
    events = await replays.publish(90, keys=5)
    await replays.passed_by(book)
    async with replays.engine(broken) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        with pytest.raises(HandlerFailed, match="33 is too much"):
            await replays.finish(engine, run)
        assert (await engine.progress(run.run_id)).state is ReplayState.FAILED
        await same_as_recomputed(replays, events)  # the live tables serve
        with pytest.raises(ReplayRefused, match="is failed"):
            await engine.start(replays.everything, "rebuild", projection=BOTH)
    async with replays.engine(book) as engine:
        await engine.resume(run.run_id)
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    await same_as_recomputed(replays, events)


async def test_a_failing_event_in_the_swap_itself(replays: Any) -> None:
    """Nothing of the swap happened; it goes on after the fix."""
    await make_tables(replays)
    events = await replays.publish(30, keys=5)
    await replays.passed_by(book)
    place = await replays.pool.fetch("SELECT from_tick, from_token FROM soma.shards WHERE reader LIKE 'cons%' LIMIT 1")
    events += await replays.publish(10, keys=5, start=30)
    await replays.passed_by(book)
    await replays.pool.fetch(
        "UPDATE soma.shards SET from_tick = $1, from_token = $2, to_tick = NULL, to_token = NULL", *place[0]
    )

    async def broken(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 35:
            raise ValueError("35 is too much")
        await book(event, ctx)

    async with replays.engine(broken) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        with pytest.raises(HandlerFailed, match="35 is too much"):
            await replays.finish(engine, run)
        assert await replays.pool.fetch("SELECT inbox_id FROM soma.consumers WHERE name = 'billing'") == [(None,)]
        await engine.resume(run.run_id)
    async with replays.engine(book) as engine:
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    await same_as_recomputed(replays, events)


async def test_hostile_names_of_tables_and_schemas(replays: Any) -> None:
    schema, table = 'We"ird; DROP SCHEMA public --', 'a.b\' "c" ON x'
    quoted = ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))
    bare = quoted.partition('".')[2]
    async with replays.pool.connection() as connection:
        await connection.execute(f"CREATE SCHEMA {quoted.partition('.')[0]}")
        await connection.execute(f"CREATE TABLE {quoted} (id uuid PRIMARY KEY, at text DEFAULT ' ON x.y ', n int)")
        await connection.execute(f"CREATE INDEX ON {quoted} ((n + 1)) WHERE at <> ' ON x.y '")

    async def handle(event: Any, ctx: Any) -> None:
        path = "SET LOCAL search_path = " + quoted.partition(".")[0]
        if ctx.delivery.external_effects:
            await ctx.tx.execute(path)
        await ctx.tx.execute(f"INSERT INTO {bare} (id, n) VALUES ($1, $2)", event.event_id, event.payload["n"])

    await replays.publish(20)
    await replays.passed_by(handle)
    await replays.pool.fetch(f"DELETE FROM {quoted}")
    before = await replays.pool.fetch("SELECT soma.shape_of($1, ARRAY[$2])", schema, table)
    done = await rebuilt(replays, handle, Projection((table,), schema=schema))
    assert done.state is ReplayState.DONE
    rows = await replays.pool.fetch(f"SELECT n FROM {quoted} ORDER BY n")
    assert [row[0] for row in rows] == list(range(20))
    assert await replays.pool.fetch("SELECT soma.shape_of($1, ARRAY[$2])", schema, table) == before


async def test_two_begin_at_once(replays: Any) -> None:
    await make_tables(replays)
    await replays.publish(5)
    await replays.passed_by(book)
    async with replays.engine(book) as one, replays.engine(book) as two:
        both = [engine.start(replays.everything, "rebuild", projection=BOTH) for engine in (one, two)]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Progress", "ReplayRefused"], results
    assert len(await schemas(replays)) == 2  # of one: its new tables, and where the old ones go


async def test_pause_resume_and_rate(replays: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(120, keys=7)
    await replays.passed_by(book)
    async with replays.engine(book, rebuild=RebuildSettings(page=10)) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH, rate=200)
        began, paused = asyncio.get_running_loop().time(), None
        async for progress in engine.run(run.run_id):
            if progress.counts.read >= 40 and not paused:
                paused = await engine.pause(run.run_id)
        assert progress.state is ReplayState.PAUSED
        assert 40 <= progress.counts.read < 120
        await engine.resume(run.run_id)
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
        assert asyncio.get_running_loop().time() - began > 0.4
    await same_as_recomputed(replays, events)


async def test_a_reader_of_the_old_table_is_waited_for_and_live_goes_on(replays: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(50)
    async with replays.log_worker(book):
        await replays.applied(50)
        async with (
            replays.engine(book, rebuild=RebuildSettings(swap_wait=0.05, swap_every=0.05)) as engine,
            Pool(replays.dsn) as other,
        ):
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            async with other.connection() as reader:
                transaction = reader.transaction()
                await transaction.start()
                assert await reader.fetchval("SELECT count(*) FROM balance") == 10
                rebuilding = asyncio.create_task(replays.finish(engine, run))
                for round_ in range(5):  # tries of the swap come and go, and the live consumer works between them
                    events += await replays.publish(10, start=50 + 10 * round_)
                    await replays.applied(60 + 10 * round_)
                assert not rebuilding.done()
                await transaction.commit()
            assert (await rebuilding).state is ReplayState.DONE
        events += await replays.publish(20, start=100)
        await replays.applied(120)
    await same_as_recomputed(replays, events)


async def test_a_batch_in_flight_is_waited_for(replays: Any) -> None:
    """The swap comes between two batches of the live consumer, whatever they hold."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def slow(event: Any, ctx: Any) -> None:
        await book(event, ctx)
        if event.payload["n"] == 50:
            inside.set()
            await go_on.wait()

    await make_tables(replays)
    events = await replays.publish(50, keys=5)
    async with replays.log_worker(slow) as worker:
        await replays.applied(50)
        events += await replays.publish(1, keys=5, start=50)
        await inside.wait()
        quick = RebuildSettings(swap_wait=0.02, swap_every=0.02, swap_within=1.0)
        async with replays.engine(book, rebuild=quick) as engine:
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            rebuilding = asyncio.create_task(replays.finish(engine, run))
            waits = f"SELECT FROM {WAITING_LOCKS} WHERE locktype = 'advisory' AND classid = soma.swap_locks()"
            await until(lambda: replays.pool.fetch(waits), what="the swap waits")
            go_on.set()
            assert (await rebuilding).state is ReplayState.DONE
        assert worker.stats().healthy
        events += await replays.publish(30, keys=5, start=51)
        await replays.applied(81)
    await same_as_recomputed(replays, events)
