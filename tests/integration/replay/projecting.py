"""A projection of two tables, its handler, and what the tables must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soma_common.consumer.handlers import HandlerContext
from soma_common.events.models import RecordedEvent
from soma_common.replay.models import Progress
from soma_common.replay.projection import Projection

TABLES = '''
CREATE TABLE balance (key text PRIMARY KEY, total bigint NOT NULL, events bigint NOT NULL, last bigint NOT NULL,
                      CONSTRAINT in_order CHECK (last >= 0)) WITH (fillfactor = 70);
CREATE INDEX "balance by ""total""" ON balance (total DESC) WHERE total > 0;
'''
BOTH = Projection(("effect", "balance"))
SENT: list[Any] = []  # mails


async def book(event: RecordedEvent, ctx: HandlerContext) -> None:
    """A row per application, a sum per key, and a mail for what is live."""
    n = event.payload["n"]
    await ctx.tx.execute(
        "INSERT INTO effect (event_id, tenant, key, number) VALUES ($1, $2, $3, $4)",
        event.event_id, event.tenant_id, str(event.stream), n,
    )  # fmt: skip
    await ctx.tx.execute(
        "INSERT INTO balance AS b (key, total, events, last) VALUES ($1, $2, 1, $3) ON CONFLICT (key) DO UPDATE "
        "SET total = b.total + excluded.total, events = b.events + 1, last = excluded.last",
        str(event.stream), n, event.version,
    )  # fmt: skip
    if ctx.delivery.external_effects:
        SENT.append(event.event_id)


async def make_tables(replays: Any) -> None:
    SENT.clear()
    async with replays.pool.connection() as connection:
        await connection.execute(TABLES)


async def rebuilt(replays: Any, handle: Any = book, projection: Projection = BOTH) -> Progress:
    """A rebuild from its beginning to its end."""
    async with replays.engine(handle) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=projection)
        last: Progress = await replays.finish(engine, run)
        return last


async def schemas(replays: Any) -> list[str]:
    """What rebuilds have left."""
    rows = await replays.pool.fetch("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'soma\\_rebuild%'")
    return [row[0] for row in rows]


async def same_as_recomputed(replays: Any, events: Sequence[RecordedEvent]) -> None:
    """The tables are those that these events make, each once and in the order of its key."""
    await replays.check(events)
    wanted: dict[str, list[int]] = {}
    for event in events:
        wanted.setdefault(str(event.stream), []).append(event.payload["n"])
    versions = {str(event.stream): event.version for event in events}
    rows = await replays.pool.fetch("SELECT key, total, events, last FROM balance")
    assert {row[0]: tuple(row)[1:] for row in rows} == {
        key: (sum(numbers), len(numbers), versions[key]) for key, numbers in wanted.items()
    }
