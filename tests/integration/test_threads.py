"""Transactions on threads: what the consumer's loop may rely on."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from soma_common.errors import DatabaseUnavailable, TransactionConflict
from soma_common.postgres.pool import Pool, PoolSettings, fetch
from soma_common.postgres.threads import Threads, connecting
from soma_common.testing.proxy import proxy_to
from tests.integration.consumer.flavours import execute, flavour_of
from tests.waiting import until

NAME = "soma threads of a test"


@pytest.fixture(params=["psycopg", "django"])
def flavour(request: pytest.FixtureRequest, soma_database: str) -> Iterator[Any]:
    with flavour_of(request.param, soma_database) as made:
        yield made


@pytest.fixture
async def threads(flavour: Any) -> AsyncIterator[Threads]:
    made = Threads(flavour.connect, NAME)
    yield made
    await made.close()


@pytest.fixture
async def pool(soma_database: str) -> AsyncIterator[Pool]:
    async with Pool(soma_database) as made:
        await made.fetch("CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        yield made


async def rows(pool: Pool) -> list[int]:
    return [row[0] for row in await pool.fetch("SELECT n FROM t ORDER BY n")]


def alive() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


async def test_it_commits_rolls_back_and_is_used_again(threads: Threads, pool: Pool) -> None:
    seen = set()
    for n in range(5):
        async with threads.transaction() as tx:
            await fetch(tx, "INSERT INTO t VALUES ($1::integer)", (n,))
            seen.add(await tx.call(threading.get_native_id))
            assert await rows(pool) == [each for each in range(n) if each != 3]
            if n == 3:
                break  # leaving the block early is a good end
    assert len(seen) == 1
    with pytest.raises(ZeroDivisionError):
        async with threads.transaction() as tx:
            await fetch(tx, "INSERT INTO t VALUES (9)", ())
            raise ZeroDivisionError
    assert await rows(pool) == [0, 1, 2, 3]
    assert alive() == 1
    await threads.close()
    await until(lambda: alive() == 0)
    async with threads.transaction() as tx:
        assert await fetch(tx, "SELECT 1", ()) == [(1,)]


async def test_at_once_there_are_as_many_as_needed(threads: Threads, pool: Pool) -> None:
    async def one(n: int, everybody: asyncio.Barrier) -> None:
        async with threads.transaction() as tx:
            await fetch(tx, "INSERT INTO t VALUES ($1::integer)", (n,))
            await everybody.wait()

    for _ in range(2):
        await pool.fetch("TRUNCATE t")
        everybody = asyncio.Barrier(6)
        await asyncio.gather(*(one(n, everybody) for n in range(6)))
        assert await rows(pool) == list(range(6))
        assert alive() == 6


async def test_context_variables_travel(threads: Threads, pool: Pool) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    async with threads.transaction() as tx:
        assert await fetch(tx, "SELECT 1", ()) == [(1,)]
        assert await tx.call(variable.get) == "mine"


async def test_errors_have_their_meaning(threads: Threads, pool: Pool) -> None:
    with pytest.raises(TransactionConflict):
        async with threads.transaction() as tx:
            await fetch(tx, "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$", ())
    with pytest.raises(Exception, match="duplicate key"):  # the driver's, or Django's: the constraint is deferred
        async with threads.transaction() as tx:
            await fetch(tx, "INSERT INTO t VALUES (1), (1)", ())
    with pytest.raises(RuntimeError, match="CancelledError"):
        async with threads.transaction() as tx:
            await tx.call(_cancel)
    assert await rows(pool) == []


def _cancel() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("silent", [True, False])
async def test_a_connection_lost_before_commit_is_an_error(
    flavour: Any, soma_database: str, pool: Pool, silent: bool
) -> None:
    """psycopg and Django say nothing when they find it closed."""
    with proxy_to(soma_database) as proxy, flavour_of(flavour.name, proxy.through(soma_database)) as through:
        threads = Threads(through.connect, NAME)
        with pytest.raises(DatabaseUnavailable):
            async with threads.transaction() as tx:
                await fetch(tx, "INSERT INTO t VALUES (1)", ())
                proxy.cut()
                if silent:
                    with pytest.raises(DatabaseUnavailable):
                        await fetch(tx, "SELECT 1", ())
        async with threads.transaction() as tx:
            await fetch(tx, "INSERT INTO t VALUES (2)", ())
        await threads.close()
    assert await rows(pool) == [2]


@pytest.mark.parametrize("how", ["sql", "python"])
async def test_who_is_cancelled_waits_for_nothing(threads: Threads, pool: Pool, how: str) -> None:
    """The connection is cut, and what it held locked is free: also where the server was in the middle of a statement."""
    begun = asyncio.Event()

    async def one() -> None:
        async with threads.transaction() as tx:
            await fetch(tx, "LOCK TABLE t IN ACCESS EXCLUSIVE MODE", ())
            begun.set()
            await (fetch(tx, "SELECT pg_sleep(60)", ()) if how == "sql" else tx.call(time.sleep, 5.0))

    task = asyncio.create_task(one())
    await begun.wait()
    if how == "sql":
        await until(lambda: sleeps(pool))
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 3
    async with asyncio.timeout(20):
        await pool.fetch("INSERT INTO t VALUES (1)")
    await until(lambda: alive() == 0, what="the thread left behind ends when it can")


async def sleeps(pool: Pool) -> bool:
    """Whether a backend of this database is in ``pg_sleep``."""
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    return bool(await pool.fetch(sql))


async def test_an_interrupted_statement_ends_and_its_connection_is_not_used_again(threads: Threads, pool: Pool) -> None:
    backends = []
    for _ in range(2):
        with pytest.raises(Exception, match="cancel"):
            async with threads.transaction() as tx:
                backends.append((await fetch(tx, "SELECT pg_backend_pid()", ()))[0][0])
                working = tx.start(execute, tx.driver, "SELECT pg_sleep(60)")
                await until(lambda: sleeps(pool))
                tx.interrupt()
                await asyncio.wait({working}, timeout=20)
                working.result().get()
    assert len(set(backends)) == 2
    assert alive() == 1


async def test_one_that_is_terminated_while_it_connects_begins_nothing(pool: Pool) -> None:
    """The server accepts and says nothing: only the end of the connect's time frees the thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threads = Threads(connecting(PoolSettings(f"postgresql://u@127.0.0.1:{port}/d", timeout=2)), NAME)
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            async with threads.transaction() as tx:
                working = tx.start(time.sleep, 60)
                await asyncio.sleep(0.1)
                tx.terminate()
                assert working.done()
                working.result().get()
        assert time.monotonic() - began < 1.5
        await until(lambda: alive() == 0)
        with pytest.raises(DatabaseUnavailable):
            async with threads.transaction() as tx:
                await fetch(tx, "SELECT 1", ())
        await threads.close()


async def test_threads_that_rest_too_long_end(threads: Threads, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def both() -> None:
        async with threads.transaction() as one, threads.transaction() as other:
            await fetch(one, "SELECT 1", ())
            await fetch(other, "SELECT 1", ())

    await both()
    assert alive() == 2
    monkeypatch.setattr("soma_common.postgres.threads._IDLE", 0.05)

    async def one() -> bool:
        async with threads.transaction() as tx:
            await fetch(tx, "SELECT 1", ())
        return alive() == 1

    await until(one)


async def test_nothing_is_left_when_the_loop_is_gone(flavour: Any, soma_database: str) -> None:
    """A thread that ends after its loop has nobody to tell, and says so to nobody."""
    over = threading.Event()

    async def leave() -> None:
        threads = Threads(flavour.connect, NAME)
        async with threads.transaction() as tx:
            tx.start(over.wait)
            await until(lambda: tx.driver is not None)
            tx.terminate()

    def run() -> None:
        with pytest.raises(DatabaseUnavailable):
            asyncio.run(leave())

    await asyncio.to_thread(run)
    over.set()
    await until(lambda: alive() == 0)
    gc.collect()  # an open connection would warn here, and a warning is an error
    with psycopg.connect(soma_database) as connection:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        await until(lambda: connection.execute(sql).fetchone() == (0,))
