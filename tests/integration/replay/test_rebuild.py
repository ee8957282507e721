"""Rebuilding tables: new ones fill beside the old, and take their place in one transaction."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.consumer.handlers import HandlerContext
from soma_common.errors import HandlerFailed, ReplayRefused, ValidationError
from soma_common.events.models import Event, RecordedEvent
from soma_common.replay.models import Progress, ReplayFilter, ReplayMode, ReplayState
from soma_common.replay.projection import Projection
from tests.waiting import until

TABLES = '''
CREATE TABLE balance (key text PRIMARY KEY, total bigint NOT NULL, events bigint NOT NULL, last bigint NOT NULL,
                      CONSTRAINT in_order CHECK (last >= 0)) WITH (fillfactor = 70);
CREATE INDEX "balance by ""total""" ON balance (total DESC) WHERE total > 0;
CREATE TABLE mail (event_id uuid PRIMARY KEY);
'''
BOTH = Projection(("effect", "balance"))


async def book(event: RecordedEvent, ctx: HandlerContext) -> None:
    """A row per application, a sum per key, and a mail for what is live. An event that comes too early is refused."""
    n = event.payload["n"]
    await ctx.tx.execute(
        "INSERT INTO effect (event_id, tenant, key, number) VALUES ($1, $2, $3, $4)",
        event.event_id, event.tenant_id, str(event.stream), n,
    )  # fmt: skip
    late = await ctx.tx.fetchval(
        "INSERT INTO balance AS b (key, total, events, last) VALUES ($1, $2, 1, $3) ON CONFLICT (key) DO UPDATE "
        "SET total = b.total + excluded.total, events = b.events + 1, last = excluded.last RETURNING events",
        str(event.stream), n, event.version,
    )  # fmt: skip
    if ctx.delivery.external_effects:
        await asyncio.sleep(0)
        SENT.append(event.event_id)
    assert late is not None


SENT: list[Any] = []


async def prepared(replays: Any) -> None:
    SENT.clear()
    async with replays.pool.connection() as connection:
        await connection.execute(TABLES)


async def rebuilt(replays: Any, handle: Any = book, projection: Projection = BOTH, **given: Any) -> Progress:
    async with replays.engine(handle) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=projection)
        return await replays.finish(engine, run, **given)


async def schemas(replays: Any) -> list[str]:
    return [r[0] for r in await replays.pool.fetch("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'soma_rebuild%'")]


async def same_as_recomputed(replays: Any, events: list[RecordedEvent]) -> None:
    """The tables are those that all events in order make, and nothing of the rebuild is left."""
    await replays.check(events)
    wanted: dict[str, list[int]] = {}
    for event in events:
        wanted.setdefault(str(event.stream), []).append(event.payload["n"])
    rows = await replays.pool.fetch("SELECT key, total, events, last FROM balance")
    assert {row[0]: tuple(row)[1:] for row in rows} == {k: (sum(n), len(n), len(n)) for k, n in wanted.items()}
    assert await schemas(replays) == []


async def test_the_tables_are_made_anew_and_swapped(replays: Any) -> None:
    await prepared(replays)
    events = await replays.publish(900, keys=13)
    await replays.passed_by(book)
    await replays.pool.fetch("UPDATE balance SET total = total + 7")  # what a mended bug left behind
    await replays.pool.fetch("DELETE FROM effect WHERE number % 5 = 0")
    sent = list(SENT)
    before = await replays.pool.fetch("SELECT soma.shape_of('public', ARRAY['effect', 'balance'])")
    done = await rebuilt(replays)
    assert (done.state, done.counts.applied, done.counts.repeated, done.fraction) == (ReplayState.DONE, 900, 0, 1.0)
    await same_as_recomputed(replays, events)
    assert SENT == sent, "a rebuild sends no mails"
    assert await replays.pool.fetch("SELECT soma.shape_of('public', ARRAY['effect', 'balance'])") == before
    assert await replays.pool.fetch("SELECT pg_get_serial_sequence('effect', 'seq')") == [("public.effect_seq_seq",)]
    inboxes = await replays.pool.fetch("SELECT DISTINCT consumer_id FROM soma.inbox")
    assert [row[0] for row in inboxes] == [done.inbox_id], "the old inbox is cleaned away"
    events += await replays.publish(100, keys=13, start=900)
    await replays.passed_by(book)
    await same_as_recomputed(replays, events)
    assert sorted(SENT[900:]) == sorted(event.event_id for event in events[900:])
    again = await rebuilt(replays)
    assert again.counts.applied == 1000
    await same_as_recomputed(replays, events)
