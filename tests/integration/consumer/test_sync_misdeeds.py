"""Plain functions that do to their connection what they must not: the event is blamed, and nobody else suffers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import django.db
import psycopg
import pytest
from django.db import transaction

from soma_common.consumer.settings import ConsumerSettings
from soma_common.errors import ConfigurationError
from soma_common.postgres.pool import PoolSettings
from soma_common.postgres.thread_connections import refuse_end
from soma_common.postgres.threads import connecting
from tests.integration.consumer.flavours import apply, database_of, execute, flavour_of
from tests.waiting import until


def _swallow(ctx: Any) -> None:
    with pytest.raises((psycopg.Error, django.db.Error), match="division"):
        execute(ctx.tx, "SELECT 1/0")


def _raw_commit(ctx: Any) -> None:
    execute(ctx.tx, " commit ")


def _hidden_rollback(ctx: Any) -> None:
    execute(ctx.tx, "SELECT 1; ROLLBACK")


def _commit(ctx: Any) -> None:
    ctx.tx.commit()


def _roll_back(ctx: Any) -> None:
    ctx.tx.rollback()


def _with(ctx: Any) -> None:
    with ctx.tx:
        pass


def _close(ctx: Any) -> None:
    ctx.tx.close()


def _close_and_go_on(ctx: Any) -> None:
    ctx.tx.close()
    execute(ctx.tx, "SELECT 1")


def _hidden_commit(ctx: Any) -> None:
    execute(ctx.tx, "SELECT 1; COMMIT; BEGIN")


def _busy(ctx: Any) -> None:
    ctx.tx.pgconn.send_query(b"SELECT 1")


async def _coroutine(ctx: Any) -> None:
    """Called by a plain function, and never awaited."""


def _stop(ctx: Any) -> None:
    next(iter(()))


def _cancel(ctx: Any) -> None:
    raise asyncio.CancelledError


def _left_block(ctx: Any) -> None:
    transaction.atomic(using=ctx.tx.alias).__enter__()


def _asked_for_rollback(ctx: Any) -> None:
    transaction.set_rollback(True, using=ctx.tx.alias)


def _swallow_in_a_block(ctx: Any) -> None:
    with suppress(ZeroDivisionError), transaction.atomic(using=ctx.tx.alias, savepoint=False):
        raise ZeroDivisionError


_ANY = [
    (_swallow, "went on after an error of the database"),
    (_raw_commit, "asked for commit"),
    (_hidden_rollback, "ended the transaction"),
    (_hidden_commit, "committed before it was whole|ended the transaction|asked for commit"),
    (_close, "closed the connection"),
    (_close_and_go_on, "connection is closed|connection already closed|can't execute queries"),
    (_coroutine, "returned a coroutine"),
    (_stop, "StopIteration"),
    (_cancel, "CancelledError"),
]
_PSYCOPG = [
    (_commit, "forbidden within"),
    (_roll_back, "forbidden within"),
    (_with, "forbidden within"),
    (_busy, "ended the"),
]
_DJANGO = [
    (_commit, "TransactionManagementError"),
    (_roll_back, "TransactionManagementError"),
    (_left_block, "did not leave it"),
    (_asked_for_rollback, "went on after an error"),
    (_swallow_in_a_block, "went on after an error"),
]
MISDEEDS = [
    *[("psycopg", *one) for one in (*_ANY, *_PSYCOPG)],
    *[("django", *one) for one in (*_ANY, *_DJANGO)],
]


@pytest.mark.parametrize(("name", "misdeed", "told"), MISDEEDS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("keys", [1, 40])
async def test_only_the_event_whose_handler_misbehaves_is_blamed(
    world: Any, settings: Any, name: str, misdeed: Callable[[Any], Any], told: str, keys: int
) -> None:
    def handle(event: Any, ctx: Any) -> Any:
        if event.payload["n"] == 20:
            return misdeed(ctx)
        return apply(event, ctx)

    events = await world.publish(40, keys=keys)
    with flavour_of(name, world.dsn) as flavour:
        async with world.log_worker(handle, settings=settings(lanes=1), connect=flavour.connect) as worker:
            await until(lambda: worker.stats().tally.settled == 40)
            assert worker.stats().running
    letters = await world.letters()
    assert letters[0].letter.event.event_id == events[20].event_id
    assert any(part in f"{letters[0].letter.error_type} {letters[0].message}" for part in told.split("|"))
    assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * (19 if keys == 1 else 0)
    await world.check(events[:20] if keys == 1 else [event for event in events if event.payload["n"] != 20])


async def test_savepoints_are_fine(world: Any, flavour: Any) -> None:
    def savepoint(tx: Any) -> Any:
        return transaction.atomic(using=flavour.alias) if flavour.is_django else tx.transaction()

    def handle(event: Any, ctx: Any) -> None:
        with suppress(ZeroDivisionError), savepoint(ctx.tx):
            execute(ctx.tx, "INSERT INTO total VALUES ('never', 1)")
            raise ZeroDivisionError
        with suppress(psycopg.Error, django.db.Error), savepoint(ctx.tx):
            execute(ctx.tx, "SELECT 1/0")
        execute(ctx.tx, "SAVEPOINT mine")
        execute(ctx.tx, "ROLLBACK TO SAVEPOINT mine")
        with savepoint(ctx.tx):
            apply(event, ctx)

    events = await world.publish(30, keys=10)
    async with world.log_worker(handle, connect=flavour.connect):
        await world.applied(30)
    await world.check(events)
    assert not await world.pool.fetch("SELECT * FROM total")


async def test_what_a_handler_sets_on_a_connection_does_not_reach_the_next(world: Any) -> None:
    def handle(event: Any, ctx: Any) -> None:
        assert ctx.tx.execute("SELECT 1").fetchone() == (1,)
        apply(event, ctx)
        ctx.tx.row_factory = psycopg.rows.dict_row
        ctx.tx.cursor_factory = psycopg.ClientCursor

    events = await world.publish(30, keys=10)
    async with world.log_worker(handle, settings=ConsumerSettings(batch=1)):
        await world.applied(30)
    await world.check(events)


async def test_a_transaction_left_open_by_a_handler_is_found(world: Any, settings: Any) -> None:
    left: list[Any] = []

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        if event.payload["n"] == 3:
            left.append(ctx.tx.transaction())
            left[-1].__enter__()

    await world.publish(6, keys=6)
    async with world.log_worker(handle, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 6)
    (letter,) = await world.letters()
    assert letter.letter.error_type == "psycopg.transaction.OutOfOrderTransactionNesting"
    assert await world.count() == 5
    for one in left:  # their connections are closed long since
        one.gen.close()


async def test_the_session_of_a_batch_is_guarded(world: Any) -> None:
    """As asyncpg's: READ COMMITTED, commits reach the disk, a silent process does not keep its locks."""
    found: list[Any] = []
    names = ("transaction_isolation", "synchronous_commit", "idle_in_transaction_session_timeout", "application_name")

    def handle(event: Any, ctx: Any) -> None:
        found.append([execute(ctx.tx, f"SHOW {name}")[0][0] for name in names])

    session = {"default_transaction_isolation": "serializable", "synchronous_commit": "off", "application_name": "a b"}
    given = " ".join(f"-c {name}={value}".replace(" b", r"\ b") for name, value in session.items())
    serializable = psycopg.IsolationLevel.SERIALIZABLE
    options = {"OPTIONS": {"options": given, "isolation_level": serializable}}
    await world.publish(1)
    timeouts = ConsumerSettings(timeout=3, idle_timeout=7)
    plain = connecting(PoolSettings(world.dsn, settings=session))
    with flavour_of("django", world.dsn, **options) as flavour:
        async with world.log_worker(handle, consumer="plain", connect=plain, settings=timeouts):
            await until(lambda: len(found) == 1)
        async with world.log_worker(handle, consumer="django", connect=flavour.connect, settings=timeouts):
            await until(lambda: len(found) == 2)
    assert found == [["read committed", "on", "7s", "a b"]] * 2


async def test_a_connection_to_another_database_is_refused(world: Any, soma_database16: str) -> None:
    """Its inbox and lanes would be those of somebody else."""
    for name in ("psycopg", "django"):
        with flavour_of(name, soma_database16) as flavour:
            worker = world.log_worker(apply, consumer=name, connect=flavour.connect)
            await world.publish(1)
            await worker.start()
            with pytest.raises(ConfigurationError, match="another database"):
                await worker.wait()
            with pytest.raises(ConfigurationError):
                await worker.stop()
            world.workers.remove(worker)
    assert await world.count() == 0


@pytest.mark.parametrize("dsn", ["postgresql://h/d?nonsense=1", "postgresql://[::1/d"])
def test_an_address_that_libpq_cannot_read_is_told_at_once(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="libpq"):
        connecting(PoolSettings(dsn))


def test_a_database_that_django_does_not_have_is_told_at_once(soma_database: str) -> None:
    with flavour_of("django", soma_database), pytest.raises(ConfigurationError, match="no database 'nowhere'"):
        connecting(PoolSettings(soma_database), "nowhere")
    sqlite = flavour_of("django", soma_database, ENGINE="django.db.backends.sqlite3")
    with pytest.raises(ConfigurationError, match="sqlite"), sqlite:
        raise AssertionError("it was taken")
    assert database_of("postgresql://u:p%40@h:5/d")["PASSWORD"] == "p@"


@pytest.mark.parametrize(
    ("without", "alias", "told"),
    [
        ("psycopg", None, "soma-common[psycopg]"),
        ("psycopg", "default", "soma-common[psycopg]"),
        ("django", "default", "pip install django"),
        ("nothing", "default", "call django.setup() before"),
    ],
)
def test_what_is_missing_is_named(without: str, alias: str | None, told: str) -> None:
    program = (
        f"import sys; sys.modules[{without!r}] = None\n"
        "from soma_common.postgres.threads import connecting\n"
        "from soma_common.postgres.pool import PoolSettings\n"
        f"connecting(PoolSettings('postgresql://h/d'), {alias!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "ConfigurationError" in done.stderr or "MissingDependency" in done.stderr
    assert told in done.stderr


@pytest.mark.parametrize(
    "statement",
    ["COMMIT", "  end;", "-- a\n/* b\n */ commit", "/* hidden */ROLLBACK", "Rollback", "ROLLBACK WORK", "rollback transaction", "abort", b"BEGIN", "start  transaction",
     "PREPARE TRANSACTION 'x'", "commit and chain", "ROLLBACK PREPARED 'x'"],
)  # fmt: skip
def test_statements_that_end_a_transaction_are_refused(statement: Any) -> None:
    with pytest.raises(ConfigurationError, match="asked for"):
        refuse_end(statement)


@pytest.mark.parametrize(
    "statement",
    ["ROLLBACK TO SAVEPOINT x", "-- commit", "/* commit */ SELECT 1", "--a\nROLLBACK TO x", "rollback work to x", "ROLLBACK TRANSACTION TO x", "SELECT 'commit'", "ending", "SAVEPOINT x",
     "RELEASE x", "PREPARE p AS SELECT 1", b"\xff", "", "WITH commit AS (SELECT 1) SELECT 1", psycopg.sql.SQL("SELECT 1")],
)  # fmt: skip
def test_other_statements_are_not(statement: Any) -> None:
    assert refuse_end(statement) is None  # type: ignore[func-returns-value]  # it would raise
