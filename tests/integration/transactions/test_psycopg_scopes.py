"""The synchronous TransactionScope on psycopg's connections, with and without autocommit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from soma_common.errors import (
    CommitUnknown,
    ConfigurationError,
    DatabaseUnavailable,
    EventTooLarge,
    TransactionConflict,
    TransactionDoomed,
    TransactionElsewhere,
    TransactionEnded,
    TransactionError,
    ValidationError,
)
from soma_common.sync import EventStore, TransactionScope
from soma_common.testing.lane.sql_tools import SqlTools
from soma_common.tx import Tx
from tests.core_support import event, settings
from tests.waiting import wait_until


class Undone(Exception):
    """Raised to roll back."""


class World:
    """A connection, a store, a table of the user's own, and what is in both."""

    def __init__(self, dsn: str, connection: Any) -> None:
        self.dsn, self.connection, self.store = dsn, connection, EventStore(settings())

    def scope(self, mode: Any = "join") -> TransactionScope:
        return TransactionScope(self.store, self.connection, mode=mode)

    def write(self, tx: Tx, name: str) -> None:
        """A row and an event of this name."""
        tx.conn.execute("INSERT INTO rows VALUES (%s)", (name,))
        tx.publish(event(name))

    def there(self) -> str:
        """The names that are committed, as rows and as events: always the same ones."""
        tools = SqlTools.at(self.dsn)
        rows = tools.query("SELECT string_agg(name, ' ' ORDER BY ctid) FROM rows")
        events = tools.query("SELECT string_agg(aggregate_id, ' ' ORDER BY position) FROM soma.events")
        assert rows == events
        return events


@pytest.fixture(params=[True, False], ids=["autocommit", "no autocommit"])
def world(soma_database: str, request: pytest.FixtureRequest) -> Iterator[World]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    with psycopg.connect(soma_database, autocommit=request.param) as connection:
        yield World(soma_database, connection)


def test_row_and_event_commit_together(world: World) -> None:
    with world.scope() as tx:
        world.write(tx, "a")
        assert world.there() == ""
    assert world.there() == "a"


def test_row_and_event_roll_back_together(world: World) -> None:
    with pytest.raises(Undone), world.scope() as tx:
        world.write(tx, "a")
        raise Undone
    assert world.there() == ""


@pytest.mark.parametrize(
    ("mode", "inner_fails", "outer_fails", "left"),
    [
        ("join", False, False, "a b c"),
        ("join", False, True, ""),
        ("savepoint", False, False, "a b c"),
        ("savepoint", True, False, "a c"),
        ("savepoint", False, True, ""),
        ("savepoint", True, True, ""),
    ],
)
def test_a_scope_inside_of_another(world: World, mode: str, inner_fails: bool, outer_fails: bool, left: str) -> None:
    try:
        with world.scope() as outer:
            world.write(outer, "a")
            try:
                with world.scope(mode) as inner:
                    world.write(inner, "b")
                    if inner_fails:
                        raise Undone
            except Undone:
                pass
            world.write(outer, "c")
            if outer_fails:
                raise Undone
    except Undone:
        pass
    assert world.there() == left


def test_everything_is_recorded_by_one_statement(world: World) -> None:
    """Written by one append: then all of it has one ``recorded_at``, and the positions follow each other."""
    with world.scope() as tx:
        world.write(tx, "a")
        with world.scope() as inner, world.scope("savepoint") as innermost:
            world.write(inner, "b")
            world.write(innermost, "c")
        assert [e.aggregate_id for e in tx.pending] == ["a", "b", "c"]
    assert SqlTools.at(world.dsn).query("SELECT count(DISTINCT (xid, recorded_at)) FROM soma.events") == "1"


def test_a_swallowed_error_of_a_joined_scope_refuses_the_commit(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="Undone"), world.scope() as tx:
        world.write(tx, "a")
        try:
            with world.scope() as inner:
                world.write(inner, "b")
                raise Undone
        except Undone:
            pass
    assert world.there() == ""


def test_a_swallowed_error_of_the_database_refuses_the_commit(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="An error was swallowed"), world.scope() as tx:
        tx.publish(event("a"))
        with suppress(psycopg.errors.UndefinedTable):
            tx.conn.execute("INSERT INTO nowhere VALUES (1)")
    assert world.there() == ""


def test_in_a_savepoint_it_refuses_only_that(world: World) -> None:
    with world.scope() as tx:
        world.write(tx, "a")
        with pytest.raises(TransactionDoomed), world.scope("savepoint") as inner:
            world.write(inner, "b")
            with suppress(psycopg.errors.UniqueViolation):
                world.write(inner, "a")
        world.write(tx, "c")
    assert world.there() == "a c"


def test_in_a_transaction_of_the_callers_the_caller_commits(world: World) -> None:
    with world.connection.transaction():
        with world.scope() as tx:
            world.write(tx, "a")
        assert world.there() == ""
        with pytest.raises(Undone), world.scope() as tx:
            world.write(tx, "b")
            raise Undone
    assert world.there() == "a"
    with pytest.raises(Undone), world.connection.transaction():
        with world.scope() as tx:
            world.write(tx, "c")
        raise Undone
    assert world.there() == "a"


def test_in_a_transaction_that_was_begun_in_silence_the_caller_commits(soma_database: str) -> None:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    with psycopg.connect(soma_database) as connection:
        world = World(soma_database, connection)
        connection.execute("SELECT 1")
        with world.scope() as tx:
            world.write(tx, "a")
        connection.rollback()
        assert world.there() == ""
        connection.execute("SELECT 1")
        with world.scope() as tx:
            world.write(tx, "a")
        connection.commit()
        assert world.there() == "a"


def test_a_scope_in_a_block_of_the_drivers_falls_alone(world: World) -> None:
    with world.scope() as tx:
        world.write(tx, "a")
        with pytest.raises(Undone), tx.conn.transaction(), world.scope() as inner:
            world.write(inner, "b")
            raise Undone
        world.write(tx, "c")
    assert world.there() == "a c"


def test_a_new_transaction_wants_a_connection_without_one(world: World) -> None:
    with world.scope("new") as tx:
        world.write(tx, "a")
        with pytest.raises(TransactionError, match="another connection"), world.scope("new"):
            pass
        with psycopg.connect(world.dsn) as second, TransactionScope(world.store, second, mode="new") as other:
            world.write(other, "b")
        assert world.there() == "b"
    assert SqlTools.at(world.dsn).query("SELECT count(*) FROM soma.events") == "2"


def test_two_connections_do_not_take_part_in_each_other(world: World) -> None:
    with psycopg.connect(world.dsn) as second, pytest.raises(Undone), world.scope() as tx:
        world.write(tx, "a")
        with TransactionScope(world.store, second) as other:
            world.write(other, "b")
        raise Undone
    assert world.there() == "b"


def test_misuse_is_named(world: World) -> None:
    with pytest.raises(ConfigurationError, match="no synchronous event store"):
        TransactionScope(object(), world.connection)  # type: ignore[arg-type]
    scope = world.scope()
    with scope as tx:
        with pytest.raises(TransactionError, match="open already"):
            scope.__enter__()
        with pytest.raises(ValidationError):
            tx.publish(None)  # type: ignore[arg-type]
        assert isinstance(_in_a_thread(lambda: tx.conn), TransactionElsewhere)
        assert isinstance(_in_a_thread(lambda: tx.publish(event("x"))), TransactionElsewhere)
        assert isinstance(asyncio.run(_caught(tx)), TransactionElsewhere)
    with pytest.raises(TransactionEnded):
        tx.publish(event("x"))
    assert world.there() == ""


def test_an_event_that_cannot_be_recorded_undoes_everything(world: World) -> None:
    with pytest.raises(EventTooLarge), world.scope() as tx:
        world.write(tx, "a")
        tx.publish(event("b", payload={"text": "a" * 1_000_000}))
    assert world.there() == ""
    with world.scope() as tx:
        world.write(tx, "c")
    assert world.there() == "c"


def test_a_block_that_ended_its_transaction_records_no_event(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="ended its transaction"), world.scope() as tx:
        tx.publish(event("a"))
        tx.conn.execute("ROLLBACK")
    assert world.there() == ""


def test_a_conflict_has_its_name(world: World) -> None:
    SqlTools.at(world.dsn).query("INSERT INTO rows VALUES ('1')")
    with pytest.raises(TransactionConflict), world.scope() as tx:
        tx.conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        tx.conn.execute("SELECT FROM rows")
        SqlTools.at(world.dsn).query("UPDATE rows SET name = '2'")
        tx.conn.execute("UPDATE rows SET name = '3'")


def test_a_connection_killed_in_the_block_commits_nothing(world: World) -> None:
    with pytest.raises(DatabaseUnavailable), world.scope() as tx:
        world.write(tx, "a")
        _kill(world, tx.conn.info.backend_pid)
    assert world.there() == ""


def test_a_closed_connection_commits_nothing(world: World) -> None:
    with pytest.raises(DatabaseUnavailable), world.scope() as tx:
        tx.conn.execute("INSERT INTO rows VALUES ('a')")
        tx.conn.close()
    assert world.there() == ""
    with pytest.raises(DatabaseUnavailable), world.scope():
        pass


def test_a_connection_killed_at_commit_leaves_it_unknown(world: World) -> None:
    with pytest.raises(CommitUnknown, match="by their event_id"), world.scope() as tx:
        tx.conn.execute("INSERT INTO rows VALUES ('a')")
        _kill(world, tx.conn.info.backend_pid)
    assert world.there() == ""


def _kill(world: World, pid: int) -> None:
    tools = SqlTools.at(world.dsn)
    tools.query(f"SELECT pg_terminate_backend({pid})")
    wait_until(lambda: tools.query(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") == "0")


async def _caught(tx: Tx) -> BaseException | None:
    try:
        tx.conn  # noqa: B018
    except TransactionElsewhere as error:
        return error
    return None


def _in_a_thread(function: Any) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None
