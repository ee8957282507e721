"""The cutting proxy before a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from soma_common.testing.lane.sql_tools import SqlTools
from soma_common.testing.proxy import CommitCut, CommitWatcher, Proxy, proxy_to

_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError)


@pytest.fixture
def proxy(soma_database: str) -> Iterator[Proxy]:
    SqlTools.at(soma_database).query("CREATE TABLE told (word text)")
    with proxy_to(soma_database) as between:
        yield between


def _count(dsn: str) -> str:
    return SqlTools.at(dsn).query("SELECT count(*) FROM told")


async def test_cut_resets_open_connections_and_serves_new_ones(proxy: Proxy, soma_database: str) -> None:
    connection = await asyncpg.connect(proxy.through(soma_database))
    assert proxy.connections == 1
    assert proxy.cut() == 1
    with pytest.raises(_LOST):
        await connection.fetchval("SELECT 1")
    again = await asyncpg.connect(proxy.through(soma_database))
    assert await again.fetchval("SELECT 1") == 1
    await again.close()


async def test_refuse_and_forward(proxy: Proxy, soma_database: str) -> None:
    proxy.refuse()
    with pytest.raises((*_LOST, OSError)):
        await asyncpg.connect(proxy.through(soma_database))
    proxy.forward()
    connection = await asyncpg.connect(proxy.through(soma_database))
    await connection.close()


@pytest.mark.parametrize(("when", "rows"), [(CommitCut.AFTER, "1"), (CommitCut.BEFORE, "0")])
async def test_cut_at_commit_of_asyncpg(proxy: Proxy, soma_database: str, when: CommitCut, rows: str) -> None:
    proxy.cut_at_commit(when)
    connection = await asyncpg.connect(proxy.through(soma_database))
    with pytest.raises(_LOST):
        async with connection.transaction():
            await connection.execute("INSERT INTO told VALUES ($1)", "COMMIT")
    assert proxy.commit_cuts == 1
    assert _count(soma_database) == rows


@pytest.mark.parametrize(("when", "rows"), [(CommitCut.AFTER, "1"), (CommitCut.BEFORE, "0")])
def test_cut_at_commit_of_psycopg(proxy: Proxy, soma_database: str, when: CommitCut, rows: str) -> None:
    proxy.cut_at_commit(when)
    with psycopg.connect(proxy.through(soma_database)) as connection:
        connection.execute("INSERT INTO told VALUES ('once')")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    assert _count(soma_database) == rows


def test_commit_is_found_across_packets_and_not_in_data() -> None:
    watcher = CommitWatcher()
    startup = b"\0\0\0\x08\0\3\0\0"
    assert not watcher.feed(startup)
    assert not watcher.feed(b"Q\0\0\0\x14SELECT 'COMMIT'\0")
    assert not watcher.feed(b"Q\0\0\0\x0cCOM")
    assert watcher.feed(b"MIT;\0")
    assert watcher.feed(b"P\0\0\0\x0f" + b"s1\0commit\0\0\0"[:11] + b"Q\0\0\0\x0bCOMMIT\0")
