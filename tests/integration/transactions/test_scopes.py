"""TransactionScope on real PostgreSQL: what takes part in what, and how it is used."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from soma_common.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    TransactionDoomed,
    TransactionEnded,
    TransactionError,
    ValidationError,
    WrongExpectedVersion,
)
from soma_common.events.models import NO_STREAM
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.tracing.context import TraceContext
from soma_common.transactions import TransactionScope
from tests.core_support import event, opened, settings
from tests.scope_support import Undone, World


async def test_row_and_event_commit_together(world: World) -> None:
    async with world.scope() as tx:
        await world.write(tx, "a")
        assert [e.aggregate_id for e in tx.pending] == ["a"]
        assert await world.there() == []
    assert await world.there() == ["a"]


async def test_row_and_event_roll_back_together(world: World) -> None:
    with pytest.raises(Undone):
        async with world.scope() as tx:
            await world.write(tx, "a")
            raise Undone
    assert await world.there() == []


async def test_an_event_may_be_recorded_at_once_and_its_version_is_known(world: World) -> None:
    """``publish(tx=)`` takes the scope's Tx as it takes a connection; what fails there can be dealt with."""
    async with world.scope() as tx:
        [first] = await world.store.publish(event("a"), expected_version=NO_STREAM, tx=tx)
        with pytest.raises(WrongExpectedVersion):
            await world.store.publish(event("a"), expected_version=NO_STREAM, tx=tx)
        assert first.version == 1
    assert [each.version for each in await world.store.query(tenant_id=first.tenant_id)] == [1]
    with pytest.raises(TransactionEnded):
        await world.store.publish(event("a"), tx=tx)


async def test_everything_is_recorded_by_one_statement(world: World) -> None:
    said: list[str] = []
    async with world.scope() as tx:
        tx.conn.add_query_logger(lambda query: said.append(query.query))
        await world.write(tx, "a")
        async with world.scope() as inner:
            await world.write(inner, "b")
            async with world.scope("savepoint") as innermost:
                await world.write(innermost, "c")
        await world.write(tx, "d")
    assert [query for query in said if "soma.append" in query] == [said[-2]]
    assert said[-1] == "COMMIT;"
    assert await world.there() == ["a", "b", "c", "d"]
    assert len(await world.store.pool.fetch("SELECT DISTINCT xid FROM soma.events")) == 1


async def test_a_scope_without_events_writes_only_its_rows(world: World) -> None:
    async with world.scope() as tx:
        await tx.conn.execute("INSERT INTO rows VALUES ('a')")
    assert [tuple(row) for row in await world.store.pool.fetch("SELECT name FROM rows")] == [("a",)]


@pytest.mark.parametrize(
    ("mode", "inner_fails", "outer_fails", "left"),
    [
        ("join", False, False, ["a", "b", "c"]),
        ("join", False, True, []),
        ("savepoint", False, False, ["a", "b", "c"]),
        ("savepoint", True, False, ["a", "c"]),
        ("savepoint", False, True, []),
        ("savepoint", True, True, []),
        ("new", False, False, ["b", "a", "c"]),
        ("new", True, False, ["a", "c"]),
        ("new", False, True, ["b"]),
        ("new", True, True, []),
    ],
)
async def test_a_scope_inside_of_another(
    world: World, mode: str, inner_fails: bool, outer_fails: bool, left: list[str]
) -> None:
    try:
        async with world.scope() as outer:
            await world.write(outer, "a")
            try:
                async with world.scope(mode) as inner:
                    assert (inner.conn is outer.conn) == (mode != "new")
                    await world.write(inner, "b")
                    if inner_fails:
                        raise Undone
            except Undone:
                pass
            await world.write(outer, "c")
            if outer_fails:
                raise Undone
    except Undone:
        pass
    assert await world.there() == left


@pytest.mark.parametrize("mode", ["join", "savepoint", "new"])
async def test_an_outermost_scope_is_a_transaction_in_every_mode(world: World, mode: str) -> None:
    with pytest.raises(Undone):
        async with world.scope(mode) as tx:
            await world.write(tx, "a")
            raise Undone
    async with world.scope(mode) as tx:
        await world.write(tx, "b")
    assert await world.there() == ["b"]


async def test_a_swallowed_error_of_a_joined_scope_refuses_the_commit(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="Undone: half done.*mode='savepoint'") as refused:
        async with world.scope() as tx:
            await world.write(tx, "a")
            try:
                async with world.scope() as inner:
                    await world.write(inner, "b")
                    raise Undone("half done")
            except Undone:
                pass
    assert isinstance(refused.value.__cause__, Undone)
    assert await world.there() == []


async def test_a_doomed_savepoint_takes_nothing_else_along(world: World) -> None:
    """The error of the third level is swallowed in the second: that one is undone, the first goes on."""
    async with world.scope() as tx:
        await world.write(tx, "a")
        with pytest.raises(TransactionDoomed):
            async with world.scope("savepoint") as middle:
                await world.write(middle, "b")
                try:
                    async with world.scope() as inner:
                        await world.write(inner, "c")
                        raise Undone
                except Undone:
                    pass
        await world.write(tx, "d")
    assert await world.there() == ["a", "d"]


async def test_the_doom_of_a_third_level_reaches_the_first(world: World) -> None:
    with pytest.raises(TransactionDoomed):
        async with world.scope(), world.scope():
            try:
                async with world.scope() as inner:
                    await world.write(inner, "c")
                    raise Undone
            except Undone:
                pass
    assert await world.there() == []


async def test_three_savepoints_deep_each_falls_alone(world: World) -> None:
    async with world.scope() as one:
        await world.write(one, "a")
        async with world.scope("savepoint") as two:
            await world.write(two, "b")
            with pytest.raises(Undone):
                async with world.scope("savepoint") as three:
                    await world.write(three, "c")
                    await world.write(one, "d")  # through the outermost tx: it is in the savepoint all the same
                    raise Undone
            await world.write(two, "e")
    assert await world.there() == ["a", "b", "e"]


async def test_an_error_that_passes_is_the_error_that_is_seen(world: World) -> None:
    with pytest.raises(Undone):
        async with world.scope(), world.scope(), world.scope("savepoint"):
            raise Undone


async def test_a_swallowed_error_of_the_database_refuses_the_commit(world: World) -> None:
    """PostgreSQL would answer COMMIT by a ROLLBACK, and asyncpg would say nothing."""
    for publish in (False, True):
        with pytest.raises(TransactionDoomed, match="A statement failed") as refused:
            async with world.scope() as tx:
                if publish:
                    tx.publish(event("a"))
                with pytest.raises(asyncpg.UndefinedTableError):
                    await tx.conn.execute("INSERT INTO nowhere VALUES (1)")
        assert refused.value.cure is not None
    assert await world.there() == []


async def test_in_a_savepoint_it_refuses_only_that(world: World) -> None:
    async with world.scope() as tx:
        await world.write(tx, "a")
        with pytest.raises(TransactionDoomed):
            async with world.scope("savepoint") as inner:
                await world.write(inner, "b")
                with pytest.raises(asyncpg.UniqueViolationError):
                    await inner.conn.execute("INSERT INTO rows VALUES ('a')")
        await world.write(tx, "c")
    assert await world.there() == ["a", "c"]


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_a_transaction_that_the_block_ended_itself_records_no_events(world: World, end: str) -> None:
    with pytest.raises(TransactionDoomed, match="ended its transaction by itself"):
        async with world.scope() as tx:
            tx.publish(event("a"))
            await tx.conn.execute(end)
    assert await world.there() == []
    async with world.scope() as tx:  # the connection is good for others
        await world.write(tx, "b")
    assert await world.there() == ["b"]


@pytest.mark.parametrize("wrong", [None, "event", [event("b")], object()])
async def test_what_is_no_event_is_refused_where_it_is_published(world: World, wrong: Any) -> None:
    async with world.scope() as tx:
        with pytest.raises(ValidationError, match="is no Event"):
            tx.publish(event("b"), wrong)
        assert tx.pending == ()
        await world.write(tx, "a")
    assert await world.there() == ["a"]


async def test_two_databases_do_not_take_part_in_each_other(world: World) -> None:
    async with opened(world.dsn) as other:
        with pytest.raises(Undone):
            async with world.scope() as tx:
                await world.write(tx, "a")
                async with TransactionScope(other) as foreign:
                    assert foreign.conn is not tx.conn
                    await world.write(foreign, "b")
                    async with world.scope() as again:  # the innermost one of its own pool
                        assert again.conn is tx.conn
                raise Undone
    assert await world.there() == ["b"]


async def test_two_stores_do_not_share_a_transaction(world: World) -> None:
    other = EventStore(world.store.pool, settings(service_id="other"))
    async with world.scope():
        with pytest.raises(ConfigurationError, match="Two event stores"):
            async with TransactionScope(other):
                pass
        async with TransactionScope(other, mode="new") as tx:
            await world.write(tx, "a")
    assert await world.there() == ["a"]


async def test_events_join_the_trace_that_is_current_when_they_are_published(soma_database: str) -> None:
    now: list[TraceContext | None] = [None]
    one, two, own = TraceContext.new(), TraceContext.new(), TraceContext.new()
    async with opened(soma_database, current_trace=lambda: now[0]) as store:
        async with TransactionScope(store, trace=one) as tx:
            tx.publish(event("a"))
            now[0] = two
            tx.publish(event("b"), event("c", trace=own))
            now[0] = None
        found = await store.query(tenant_id="t")
    assert [e.trace_id for e in found] == [one.trace_id, two.trace_id, own.trace_id]


async def test_wrong_arguments_are_refused(world: World) -> None:
    with pytest.raises(ConfigurationError, match="no event store"):
        TransactionScope(world.store.pool)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'nested' is no mode"):
        TransactionScope(world.store, mode="nested")  # type: ignore[arg-type]


async def test_a_scope_is_entered_once_at_a_time_and_may_be_used_again(world: World) -> None:
    scope = world.scope()
    async with scope as tx:
        await world.write(tx, "a")
        with pytest.raises(TransactionError, match="open already"):
            await scope.__aenter__()
    async with scope as tx:
        await world.write(tx, "b")
    assert await world.there() == ["a", "b"]


async def test_a_scope_that_could_not_begin_may_be_tried_again(world: World) -> None:
    async with Pool("postgresql://nobody@127.0.0.1:1/none") as pool:
        scope = TransactionScope(EventStore(pool, settings()))
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                async with scope:
                    pass


async def test_a_scope_that_outlives_the_one_around_it_refuses_the_commit(world: World) -> None:
    outer, inner = world.scope(), world.scope()
    tx = await outer.__aenter__()
    await inner.__aenter__()
    await world.write(tx, "a")
    with pytest.raises(TransactionDoomed, match="still open"):
        await outer.__aexit__(None, None, None)
    await inner.__aexit__(None, None, None)
    assert await world.there() == []
    async with world.scope() as tx:  # nothing of them is left to take part in
        await world.write(tx, "b")
    assert await world.there() == ["b"]


async def test_many_at_once_stay_apart(world: World) -> None:
    async def work(number: int) -> None:
        async with world.scope() as tx:
            await world.write(tx, f"{number}")
            async with world.scope("savepoint") as inner:
                await world.write(inner, f"{number}.1")
            if number % 2:
                raise Undone

    await asyncio.gather(*(work(number) for number in range(40)), return_exceptions=True)
    kept = {f"{number}{part}" for number in range(0, 40, 2) for part in ("", ".1")}
    assert set(await world.there()) == kept
