"""TransactionScope on real PostgreSQL: what takes part in what, and what is left after each way to end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from soma_common.errors import (
    CommitUnknown,
    ConfigurationError,
    DatabaseUnavailable,
    EventTooLarge,
    PayloadInvalid,
    TransactionConflict,
    TransactionDoomed,
    TransactionError,
    ValidationError,
)
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.testing.lane.sql_tools import SqlTools
from soma_common.tracing.context import TraceContext
from soma_common.transactions import TransactionScope
from soma_common.tx import Tx
from tests.core_support import connected, event, opened, settings
from tests.waiting import until


class Undone(Exception):
    """Raised to roll back."""


class World:
    """A store, a table of the user's own, and what is in both."""

    def __init__(self, store: EventStore, dsn: str) -> None:
        self.store, self.dsn = store, dsn

    def scope(self, mode: Any = "join") -> TransactionScope:
        return TransactionScope(self.store, mode=mode)

    async def write(self, tx: Tx, name: str) -> None:
        """A row and an event of this name."""
        await tx.conn.execute("INSERT INTO rows VALUES ($1)", name)
        tx.publish(event(name))

    async def there(self) -> list[str]:
        """The names that are there, as rows and as events: always the same ones."""
        rows = [row[0] for row in await self.store.pool.fetch("SELECT name FROM rows ORDER BY ctid")]
        events = [
            row[0] for row in await self.store.pool.fetch("SELECT aggregate_id FROM soma.events ORDER BY position")
        ]
        assert sorted(rows) == sorted(events)
        return events


@pytest.fixture
async def world(soma_database: str) -> AsyncIterator[World]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    async with opened(soma_database) as store:
        yield World(store, soma_database)


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


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (event("x", payload={"text": "a" * 1_000_000}), EventTooLarge),
        (event("x", payload={"thing": object()}), PayloadInvalid),
        (event("x", payload={"n": float("nan")}), PayloadInvalid),
        (event("x", payload={"text": "\0"}), PayloadInvalid),
    ],
)
async def test_an_event_that_cannot_be_recorded_undoes_everything(world: World, bad: Any, error: Any) -> None:
    with pytest.raises(error):
        async with world.scope() as tx:
            await world.write(tx, "a")
            tx.publish(bad)
    assert await world.there() == []


@pytest.mark.parametrize("wrong", [None, "event", [event("b")], object()])
async def test_what_is_no_event_is_refused_where_it_is_published(world: World, wrong: Any) -> None:
    async with world.scope() as tx:
        with pytest.raises(ValidationError, match="is no Event"):
            tx.publish(event("b"), wrong)
        assert tx.pending == ()
        await world.write(tx, "a")
    assert await world.there() == ["a"]


async def test_too_many_events_undo_everything(world: World) -> None:
    with pytest.raises(ValidationError, match="10001 events"):
        async with world.scope() as tx:
            await world.write(tx, "a")
            tx.publish(*[event("b")] * 10_000)
    assert await world.there() == []


async def test_a_constraint_that_waits_for_the_commit_undoes_everything(world: World) -> None:
    await world.store.pool.fetch("ALTER TABLE rows ADD CONSTRAINT later UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
    await world.store.pool.fetch("ALTER TABLE rows DROP CONSTRAINT rows_pkey")
    with pytest.raises(asyncpg.UniqueViolationError):
        async with world.scope() as tx:
            await world.write(tx, "a")
            await tx.conn.execute("INSERT INTO rows VALUES ('a')")
    assert await world.there() == []


async def test_a_deadlock_is_a_conflict(world: World) -> None:
    await world.store.pool.fetch("INSERT INTO rows VALUES ('1'), ('2')")
    update = "UPDATE rows SET name = name WHERE name = $1"
    first = asyncio.Event()

    async def work(mine: str, theirs: str) -> None:
        async with world.scope() as tx:
            await tx.conn.execute(update, mine)
            if mine == "1":
                first.set()
                async with connected(world.dsn) as watcher:
                    await until(lambda: watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            else:
                await first.wait()
            await tx.conn.execute(update, theirs)

    ended = await asyncio.gather(work("1", "2"), work("2", "1"), return_exceptions=True)
    assert sorted(type(error).__name__ for error in ended) == ["NoneType", "TransactionConflict"]


async def test_a_serialization_failure_is_a_conflict(world: World) -> None:
    await world.store.pool.fetch("INSERT INTO rows VALUES ('1')")
    with pytest.raises(TransactionConflict):
        async with world.scope() as tx:
            await tx.conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await tx.conn.fetch("SELECT FROM rows")
            async with world.scope("new") as other:
                await other.conn.execute("UPDATE rows SET name = '2'")
            await tx.conn.execute("UPDATE rows SET name = '3'")


async def test_a_cancelled_scope_rolls_back(world: World) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with world.scope() as outer:
            await world.write(outer, "a")
            async with world.scope("savepoint") as tx:
                await world.write(tx, "b")
                inside.set()
                await tx.conn.execute("SELECT pg_sleep(60)")

    working = asyncio.create_task(work())
    await inside.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await world.there() == []


async def test_cancelled_at_any_moment_it_leaves_all_or_nothing(world: World) -> None:
    """And the connections are good for others afterwards."""

    async def work(name: str) -> None:
        async with world.scope() as outer:
            await world.write(outer, name)
            async with world.scope("savepoint") as inner:
                await world.write(inner, f"{name}.1")
            async with world.scope("new") as other:
                await world.write(other, f"{name}.2")

    chance = random.Random(1)
    for number in range(150):
        working = asyncio.create_task(work(str(number)))
        await asyncio.sleep(chance.uniform(0, 0.02))
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
    names = set(await world.there())
    assert {name for name in names if f"{name}.1" in names} == {name for name in names if "." not in name}
    assert 0 < len(names) < 450
    await work("last")
    assert {"last", "last.1", "last.2"} <= set(await world.there())


async def test_a_joined_scope_that_ran_out_of_time_refuses_the_commit(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="CancelledError"):
        async with world.scope() as tx:
            await world.write(tx, "a")
            try:
                async with asyncio.timeout(0.05), world.scope():
                    await asyncio.sleep(60)
            except TimeoutError:
                pass
    assert await world.there() == []


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


async def test_a_connection_killed_in_the_block_commits_nothing(world: World) -> None:
    with pytest.raises(DatabaseUnavailable):
        async with world.scope() as tx:
            await world.write(tx, "a")
            await _kill(world, await tx.conn.fetchval("SELECT pg_backend_pid()"))
    assert await world.there() == []


@pytest.mark.parametrize("kind", ["none", "some"])
async def test_a_connection_killed_while_it_commits(world: World, kind: str) -> None:
    """With an event the scope finds out that nothing was committed; without one nobody can tell."""
    await _slow_commit(world)
    working = asyncio.create_task(_write_slowly(world, kind == "some"))
    async with connected(world.dsn) as watcher:
        committing = "SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT;' AND wait_event = 'PgSleep'"
        pid = await until(lambda: watcher.fetchval(committing))
        await watcher.execute("SELECT pg_terminate_backend($1)", pid)
    with pytest.raises(DatabaseUnavailable if kind == "some" else CommitUnknown):
        await working
    assert await world.store.pool.fetch("SELECT FROM rows") == []


async def test_a_commit_whose_answer_is_lost_is_found_out_about(world: World) -> None:
    """The connection is cut while the server commits; the server does not notice, and commits."""
    from soma_common.testing.proxy import proxy_to

    await _slow_commit(world, seconds=1)
    with proxy_to(world.dsn) as proxy:
        async with opened(proxy.through(world.dsn)) as store:
            working = asyncio.create_task(_write_slowly(World(store, world.dsn), True))
            async with connected(world.dsn) as watcher:
                committing = "SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT;' AND wait_event = 'PgSleep'"
                await until(lambda: watcher.fetchval(committing))
            await asyncio.to_thread(proxy.cut)
            await working
    assert await world.there() == ["a"]


async def _kill(world: World, pid: int) -> None:
    async with connected(world.dsn) as watcher:
        await watcher.execute("SELECT pg_terminate_backend($1)", pid)
        await until(lambda: watcher.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid))


async def _slow_commit(world: World, *, seconds: int = 60) -> None:
    """From now on the COMMIT of a transaction that writes a row takes its time."""
    async with connected(world.dsn) as connection:
        await connection.execute(f"""
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON rows DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION slow();
        """)


async def _write_slowly(world: World, publish: bool) -> None:
    async with world.scope() as tx:
        await tx.conn.execute("INSERT INTO rows VALUES ('a')")
        if publish:
            tx.publish(event("a"))
