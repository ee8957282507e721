"""PostgreSQL servers of the lane: restart, kill, pause, a standby that lags and is promoted."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from soma_common.errors import MissingDependency, ServerUnavailable
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.postgres import PostgresServer

pytestmark = pytest.mark.xdist_group("lane-postgres")  # one worker, so that what they share is made once


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer.start(settings={"wal_writer_delay": "10s"}) as server:
        server.sql.query("CREATE TABLE kept (word text)")
        yield server


def _add(server: PostgresServer, word: str) -> None:
    with psycopg.connect(server.dsn) as connection:
        connection.execute("INSERT INTO kept VALUES (%s)", (word,))


def _has(server: PostgresServer, word: str) -> bool:
    return server.sql.query(f"SELECT count(*) FROM kept WHERE word = '{word}'") == "1"


def test_settings_go_on_top_of_the_shared_file(server: PostgresServer) -> None:
    assert server.sql.query("SHOW wal_writer_delay") == "10s"
    assert server.sql.query("SHOW max_prepared_transactions") == "32"
    assert server.sql.query("SHOW listen_addresses") == "127.0.0.1"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_what_was_committed_and_the_address(server: PostgresServer, mode: str) -> None:
    before = server.dsn
    _add(server, mode)
    server.restart("immediate" if mode == "immediate" else "fast")
    assert server.dsn == before
    assert _has(server, mode)


def test_kill_and_start_again(server: PostgresServer) -> None:
    _add(server, "killed")
    server.kill()
    assert not server.process.alive
    assert not server.sql.answers()
    server.start_again()
    assert _has(server, "killed")


def test_pause_stops_every_backend_and_resume_goes_on(server: PostgresServer) -> None:
    with psycopg.connect(f"{server.dsn}?connect_timeout=2", autocommit=True) as connection:
        server.pause()
        try:
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(f"{server.dsn}?connect_timeout=2")
        finally:
            server.resume()
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_another_handle_attaches_by_folder(server: PostgresServer) -> None:
    other = PostgresServer.attach(server.folder)
    assert other.dsn == server.dsn
    other.restart()
    assert server.sql.answers()
    other.process.release()


def test_a_lagging_standby_is_promoted_without_the_last_commits(server: PostgresServer) -> None:
    with server.standby() as standby:
        _add(server, "arrived")
        standby.catch_up(server)
        standby.disconnect()
        _add(server, "too late")
        standby.promote()
        assert _has(standby, "arrived")
        assert not _has(standby, "too late")
        assert _has(server, "too late")
        _add(standby, "new timeline")


def test_a_standby_that_reconnects_catches_up(server: PostgresServer) -> None:
    with server.standby(name="second") as standby:
        standby.disconnect()
        _add(server, "in between")
        standby.reconnect()
        standby.catch_up(server)
        assert _has(standby, "in between")


def test_a_server_that_cannot_start_shows_the_end_of_its_log() -> None:
    parent = scratch_folder("broken")
    with pytest.raises(ServerUnavailable, match='unrecognized configuration parameter "no_such_setting"'):
        PostgresServer.start(settings={"no_such_setting": "1"}, parent=parent)
    (kept,) = parent.glob("soma-postgres-*/server.log")
    assert "no_such_setting" in kept.read_text()
    assert not (kept.parent / "data").exists()
    shutil.rmtree(parent)


def test_a_lost_race_for_a_port_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as winner:
        ports = iter([winner.getsockname()[1], free_port()])
        monkeypatch.setattr("soma_common.testing.lane.postgres.free_port", lambda: next(ports))
        with PostgresServer.start() as server:
            assert server.sql.answers()
            other = PostgresServer.attach(server.folder)
            assert other.port == server.port != winner.getsockname()[1]
            other.process.release()


def test_a_major_that_is_not_installed_names_the_cure() -> None:
    with pytest.raises(MissingDependency, match="install the system package postgresql-9"):
        PostgresServer.start(9)


def test_close_leaves_no_file_and_no_process() -> None:
    with PostgresServer.start() as server:
        folder, process = server.folder, server.process
        assert (folder / "server.log").exists()
    assert not Path(folder).exists()
    assert not process.alive
