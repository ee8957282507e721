"""What a rebuild may not touch, make or begin: refused, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.errors import ReplayRefused, ValidationError
from soma_common.replay.models import ReplayFilter, ReplayState
from soma_common.replay.projection import Projection
from tests.integration.replay.projecting import BOTH, book, make_tables, same_as_recomputed, schemas

OBSTACLES = {
    "view": ("CREATE VIEW rich AS SELECT * FROM balance", "view rich"),
    "materialized view": ("CREATE MATERIALIZED VIEW rich AS SELECT * FROM balance", "materialized view rich"),
    "foreign key to it": ("CREATE TABLE note (key text REFERENCES balance)", "note_key_fkey"),
    "foreign key of it": ("ALTER TABLE balance ADD CONSTRAINT k FOREIGN KEY (key) REFERENCES total (key) NOT VALID", "foreign key k"),
    "trigger": ("CREATE TRIGGER t BEFORE TRUNCATE ON balance EXECUTE FUNCTION soma.refuse_change()", "trigger t"),
    "row security": ("ALTER TABLE balance ENABLE ROW LEVEL SECURITY", "row security"),
    "rule": ("CREATE RULE r AS ON DELETE TO balance DO INSTEAD NOTHING", "rules"),
    "publication": ("CREATE PUBLICATION p FOR TABLE balance", "publication p"),
    "row type": ("CREATE FUNCTION f(balance) RETURNS int LANGUAGE sql AS 'SELECT 1'", "function f"),
    "column grant": ("GRANT SELECT (total) ON balance TO PUBLIC", "grants on columns"),
    "inheritance": ("CREATE TABLE child () INHERITS (balance)", "no plain table"),
    "missing": ("ALTER TABLE balance RENAME TO other", "balance does not exist"),
    "unlogged": ("ALTER TABLE balance SET UNLOGGED", "no plain table"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("INSERT INTO public.balance (key, total, events, last) VALUES ($1, 1, 1, 1) ON CONFLICT DO NOTHING", "public.balance"),
        ("INSERT INTO total (key, n) VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1", "public.total"),
        ("UPDATE soma.consumers SET name = name WHERE name = $1", "soma.consumers"),
    ],
)  # fmt: skip
async def test_a_handler_that_writes_elsewhere_is_refused(replays: Any, statement: str, told: str) -> None:
    """A name with a schema, a forgotten table, the library's own: nothing of it commits."""

    async def stray(event: Any, ctx: Any) -> None:
        await book(event, ctx)
        await ctx.tx.execute(statement, str(event.stream))

    await make_tables(replays)
    events = await replays.publish(20)
    await replays.passed_by(book)
    async with replays.engine(stray) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        with pytest.raises(ReplayRefused, match=f"wrote to {told}"):
            await replays.finish(engine, run)
        assert (await engine.progress(run.run_id)).state is ReplayState.FAILED
        await engine.cancel(run.run_id)
    assert await replays.pool.fetch("SELECT FROM total") == []
    await same_as_recomputed(replays, events)
    assert await schemas(replays) == []


@pytest.mark.parametrize("name", OBSTACLES)
async def test_what_a_swap_would_break_is_refused_at_the_beginning(replays: Any, name: str) -> None:
    statement, told = OBSTACLES[name]
    await make_tables(replays)
    await replays.publish(5)
    await replays.passed_by(book)
    await replays.pool.fetch(statement)
    async with replays.engine(book) as engine:
        with pytest.raises(ReplayRefused, match=f"cannot be rebuilt.*{told}"):
            await engine.start(replays.everything, "rebuild", projection=BOTH)
    assert await schemas(replays) == []
    assert await replays.pool.fetch("SELECT FROM soma.rebuilds") == []


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("CREATE VIEW rich AS SELECT * FROM balance", "view rich"),
        ("ALTER TABLE balance ADD COLUMN note text", "changed since"),
        ('DROP INDEX "balance by ""total"""', "changed since"),
        ("ALTER TABLE balance RENAME TO other", "does not exist"),
    ],
)
async def test_what_comes_up_later_is_refused_at_the_swap(replays: Any, statement: str, told: str) -> None:
    await make_tables(replays)
    events = await replays.publish(20)
    await replays.passed_by(book)
    async with replays.engine(book) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        assert (await replays.finish(engine, run, swap=False)).state is ReplayState.RUNNING
        await replays.pool.fetch(statement)
        with pytest.raises(ReplayRefused, match=told):
            await replays.finish(engine, run)
        await engine.cancel(run.run_id)
    await replays.check(events)
    assert await schemas(replays) == []


@pytest.mark.parametrize(
    "given",
    [((),), ("abc",), (("a", "a"),), (("",),), (("a\0",),), (("x" * 64,),), (("\ud800",),), ((5,),), (("a",), ""),
     (("a",), "public", "a\0"), (("a",), "public", 5)],
)  # fmt: skip
def test_a_projection_that_cannot_be(given: Any) -> None:
    with pytest.raises(ValidationError):
        Projection(*given)


@pytest.mark.parametrize(
    ("create", "told"),
    [
        ("CREATE TABLE other (a int)", "makes other, not balance"),
        ("", "makes nothing"),
        ("CREATE TABLE balance (a int); CREATE VIEW v AS SELECT * FROM balance", "makes balance, v"),
        ("CREATE TABLE balance (a nonsense)", "nonsense"),
        ("this is no SQL", "syntax error"),
        ("CREATE TABLE balance (a int); COMMIT; BEGIN", "cannot be made.*transaction commands"),
    ],
)
async def test_create_statements_that_make_something_else(replays: Any, create: str, told: str) -> None:
    await make_tables(replays)
    await replays.publish(5)
    await replays.passed_by(book)
    async with replays.engine(book) as engine:
        with pytest.raises(ReplayRefused, match=told):
            await engine.start(replays.everything, "rebuild", projection=Projection(("balance",), create=create))
    assert await replays.pool.fetch("SELECT FROM soma.rebuilds") == []


async def test_refusals(replays: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(5)
    await replays.passed_by(book)
    async with replays.engine(book) as engine:
        with pytest.raises(ReplayRefused, match="covers all events"):
            await engine.start(ReplayFilter(tenant_id="acme"), "rebuild", projection=BOTH)
        with pytest.raises(ReplayRefused, match="names no tables"):
            await engine.start(replays.everything, "rebuild")
        with pytest.raises(ReplayRefused, match="fills no new tables"):
            await engine.start(replays.everything, "missing", projection=BOTH)
        for source in ("", "Log", 5, "x\0"):
            with pytest.raises(ValidationError, match="no source"):
                await engine.start(replays.everything, "rebuild", projection=BOTH, source=source)
        forced = await engine.start(replays.everything, "force", requested_by="ann", reason="why not")
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        with pytest.raises(ReplayRefused, match=f"forced replay {forced.run_id}"):
            await replays.finish(engine, run)
        await engine.cancel(forced.run_id)
        await engine.resume(run.run_id)
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    await same_as_recomputed(replays, events)


async def test_a_rebuild_whose_inbox_was_cleaned_is_not_resumed(replays: Any) -> None:
    """Its rows say what a killed process had applied of its last page."""
    await make_tables(replays)
    events = await replays.publish(30)
    await replays.passed_by(book)
    async with replays.engine(book) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        await replays.finish(engine, run, swap=False)
        await engine._checkpoints.raise_horizon(run.inbox_id, events[-1].timestamp)
        with pytest.raises(ReplayRefused, match="was cleaned while it ran"):
            await replays.finish(engine, run)
        await engine.cancel(run.run_id)
    await same_as_recomputed(replays, events)
