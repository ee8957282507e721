"""What the tables are after a swap, whatever is being made beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.errors import ReplayRefused
from soma_common.postgres.pool import Pool
from soma_common.replay.models import ReplayState
from soma_common.replay.projection import Projection
from soma_common.replay.rebuilding import RebuildSettings
from tests.integration.consumer.conftest import apply
from tests.integration.replay.projecting import BOTH, book, make_tables, rebuilt, schemas
from tests.sessions import WAITING_LOCKS
from tests.waiting import until

WAITING = f"SELECT FROM {WAITING_LOCKS} WHERE mode = 'AccessExclusiveLock'"
OWN = "CREATE TABLE effect (seq bigserial PRIMARY KEY, event_id uuid, tenant text, key text, number int, worker int);"


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("CREATE VIEW rich AS SELECT * FROM balance", "view rich"),
        ("ALTER TABLE balance ADD COLUMN note text", "changed since"),
    ],
)
async def test_what_is_being_made_while_the_swap_waits_is_seen(replays: Any, statement: str, told: str) -> None:
    """Its transaction is open when the swap begins. Unseen, a view went with the old tables, a column was missing."""
    await make_tables(replays)
    events = await replays.publish(20)
    await replays.passed_by(book)
    patient = RebuildSettings(swap_wait=30.0, swap_within=30.0)
    async with replays.engine(book, rebuild=patient) as engine, Pool(replays.dsn) as other:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        await replays.finish(engine, run, swap=False)
        async with other.connection() as migration:
            transaction = migration.transaction()
            await transaction.start()
            await migration.execute(statement)
            swapping = asyncio.create_task(replays.finish(engine, run))
            await until(lambda: replays.pool.fetch(WAITING), what="the swap waits for a table")
            await transaction.commit()
        with pytest.raises(ReplayRefused, match=told):
            await swapping
        await engine.cancel(run.run_id)
    await replays.check(events)
    assert await schemas(replays) == []


async def test_own_tables_bring_a_serial_column_of_the_same_name(replays: Any) -> None:
    await replays.publish(20)
    await replays.passed_by()
    for _ in range(2):
        assert (await rebuilt(replays, apply, Projection(("effect",), create=OWN))).state is ReplayState.DONE
        assert await replays.pool.fetch("SELECT pg_get_serial_sequence('effect', 'seq')") == [
            ("public.effect_seq_seq",)
        ]
        assert await schemas(replays) == []
    assert await replays.pool.fetch(
        "SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname = 'effect_seq_seq'"
    ) == [("public",)]
    await replays.pool.fetch("CREATE TABLE other (n bigint DEFAULT nextval('effect_seq_seq'))")
    await replays.pool.fetch("ALTER SEQUENCE effect_seq_seq RENAME TO shared")
    assert (await rebuilt(replays, apply, Projection(("effect",), create=OWN))).state is ReplayState.DONE
    assert len(await replays.pool.fetch("INSERT INTO other DEFAULT VALUES RETURNING n")) == 1, "others draw from it too"


async def test_a_name_that_is_taken_ends_the_rebuild_with_a_word(replays: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(20)
    await replays.passed_by(book)
    await replays.pool.fetch("CREATE TABLE other (n int)")
    await replays.pool.fetch("CREATE INDEX richest ON other (n)")
    create = "CREATE TABLE balance (key text PRIMARY KEY, total bigint, events bigint, last bigint); CREATE INDEX richest ON balance (total);"
    async with replays.engine(_sum) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=Projection(("balance",), create=create))
        with pytest.raises(ReplayRefused, match='cannot take the place.*"richest" already exists'):
            await replays.finish(engine, run)
        assert (await engine.progress(run.run_id)).state is ReplayState.FAILED
        await replays.pool.fetch("DROP INDEX richest")
        await engine.resume(run.run_id)
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    await replays.check(events)


async def _sum(event: Any, ctx: Any) -> None:
    await ctx.tx.execute(
        "INSERT INTO balance AS b VALUES ($1, $2, 1, $3) ON CONFLICT (key) DO UPDATE SET total = b.total + excluded.total",
        str(event.stream), event.payload["n"], event.version,
    )  # fmt: skip
