"""PostgreSQL over TCP, from the wheel's binaries and ``deployments/config/postgres/postgresql.conf``."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from soma_common.errors import ServerUnavailable
from soma_common.postgres.binaries import PostgresBinaries, account_for, find_binaries
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch
from soma_common.testing.lane.server import LaneServer, Settings, made_once, making_folder, remembered
from soma_common.testing.lane.sql_tools import SqlTools

Mode = Literal["smart", "fast", "immediate"]
_STOP: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


@dataclass(frozen=True, slots=True)
class _Settings(Settings):
    major: int
    port: int
    password: str

    def redrawn(self) -> Self:
        return replace(self, port=free_port())


class PostgresServer(LaneServer[_Settings]):
    """A PostgreSQL cluster of our own: make with ``start``, ``attach`` or as a standby; a context manager."""

    def __init__(self, folder: Path, settings: _Settings) -> None:
        super().__init__(f"PostgreSQL {settings.major}", folder, settings)
        self._binaries = find_binaries(settings.major)
        self._account = account_for(self._binaries, self.data)

    @classmethod
    def start(
        cls,
        major: int = 18,
        *,
        settings: Mapping[str, str] | None = None,
        parent: Path | None = None,
    ) -> PostgresServer:
        """Make a cluster in a new folder (under ``parent``) and start it; ``settings`` go on top of the file's.

        Raises MissingDependency when that major is not installed, ServerUnavailable with the log's end otherwise.
        """
        find_binaries(major)  # before anything is made
        server = cls(scratch_folder("postgres", parent), _Settings(major, free_port(), secrets.token_urlsafe(18)))
        server._fill(server._initialise, settings)
        return server._start_first()

    @classmethod
    def lasting(cls, folder: Path, *, major: int = 18, port: int | None = None) -> PostgresServer:
        """The server of a folder whose data last, made where it is new; ``serve`` starts it. ``port``: None: drawn.

        Raises MissingDependency, or ServerUnavailable when the folder is no server's.
        """
        find_binaries(major)
        with made_once(folder) as known:
            settings = _Settings(**known) if known else _Settings(major, free_port(), secrets.token_urlsafe(18))
            server = cls(folder, settings if port is None else replace(settings, port=port))
            if known is None:
                server._fill(server._initialise, None)
                server._remember()
        return server

    @classmethod
    def attach(cls, folder: Path) -> PostgresServer:
        """The server that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Settings(**remembered(folder)))

    @property
    def major(self) -> int:
        return self._settings.major

    @property
    def port(self) -> int:
        return self._settings.port

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def dsn(self) -> str:
        """Address of the database ``postgres``, as superuser."""
        return f"postgresql://postgres:{self._settings.password}@{LOOPBACK}:{self.port}/postgres"

    @property
    def address(self) -> str:
        """Host and port, without the secret."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def version(self) -> str:
        return self._binaries.version()

    @property
    def sql(self) -> SqlTools:
        return SqlTools(self.dsn, self._binaries)

    @property
    def binaries(self) -> PostgresBinaries:
        """The programs of this major: pg_dump, pgbench, pg_waldump …"""
        return self._binaries

    def configure(self, settings: Mapping[str, str]) -> None:
        """Add settings to the server's file; they count from the next start or reload."""
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(_lines(settings))

    def move(self, port: int) -> None:
        """Listen on ``port`` from the next start: a promoted standby takes its primary's place."""
        self._settings = replace(self._settings, port=port)
        self.configure({"port": str(port)})
        self._remember()

    def stop(self, mode: Mode = "fast") -> None:
        """Stop the server as ``pg_ctl stop -m mode``; the data stay."""
        self.process.end(_STOP[mode])

    def restart(self, mode: Mode = "fast") -> None:
        """Stop and start, as ``pg_ctl restart -m mode``; ``immediate`` skips the checkpoint and needs recovery."""
        self.stop(mode)
        self.start_again()

    def standby(self, *, name: str = "standby", settings: Mapping[str, str] | None = None) -> Standby:
        """A streaming standby of this server, started and connected."""
        folder = scratch_folder(name, self.folder.parent)
        copy = Standby(folder, _Settings(self.major, free_port(), self._settings.password), primary=self.dsn)
        copy._fill(lambda: copy.fetch(self.dsn, name), settings)
        return copy._start_first()

    def run_tool(self, program: str, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Run one of PostgreSQL's programs as the account of the cluster. Raises ServerUnavailable on failure."""
        done = self._account.run([self._binaries.path(program), *arguments], env=env)
        if done.returncode != 0:
            raise ServerUnavailable(f"{program} failed: {done.stderr.strip()}")
        return done.stdout

    def _initialise(self) -> None:
        fresh = making_folder(self.folder, mode=0o700)
        self._account.own(fresh)
        secret = self.folder / "password"
        secret.touch(mode=0o600)
        self._account.own(secret)
        secret.write_text(self._settings.password)
        access = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(secret)]
        self.run_tool(
            "initdb",
            "-D",
            str(fresh),
            "--no-sync",
            *access,
            *_locale(self.major),
            "--data-checksums",
        )
        secret.unlink()
        shared = deployments_folder() / "config" / "postgres" / "postgresql.conf"
        (fresh / "postgresql.conf").write_text(shared.read_text() + "\n# Overrides of this server\n")
        fresh.rename(self.data)

    def _fill(self, make: Callable[[], None], settings: Mapping[str, str] | None) -> None:
        """Make the data and put ``settings`` on top; a failure leaves only the log."""
        try:
            make()
            self.configure(settings or {})
        except BaseException:
            self.process.abandon()
            raise

    def _prepare(self) -> None:
        sockets = ""  # TCP only: no path-length limit, no file to clean up
        ours = {"listen_addresses": LOOPBACK, "port": str(self.port), "unix_socket_directories": sockets}
        if not (self.data / "postgresql.conf").read_text().endswith(_lines(ours)):
            self.configure(ours)

    def _launch(self, within: float) -> Launch:
        command = [self._binaries.path("postgres"), "-D", str(self.data)]
        return Launch(
            command=self._account.command(command, dies=signal.SIGQUIT),
            ready=self.sql.answers,
            user=self._account.switched_by_parent,
            stop=signal.SIGQUIT,  # nobody will read these data again: no checkpoint, but shared memory is given back
            orderly=signal.SIGINT,
            grace=5.0,
            within=within,
        )


class Standby(PostgresServer):
    """A hot standby: it replays what its primary streams until it is promoted."""

    def __init__(self, folder: Path, settings: _Settings, *, primary: str) -> None:
        super().__init__(folder, settings)
        self._primary = primary

    def fetch(self, primary: str, name: str) -> None:
        """Copy the primary's files and write the streaming settings."""
        self.data.mkdir(mode=0o700)
        self._account.own(self.data)
        source = f"{primary}?application_name={name}"
        self.run_tool(
            "pg_basebackup",
            "-d",
            source,
            "-D",
            str(self.data),
            "-R",
            "-X",
            "stream",
            "-c",
            "fast",
        )

    def disconnect(self, *, within: float = 30.0) -> None:
        """Stop receiving from the primary, so that the standby lags; ``promote`` then loses what it has not got."""
        self._follow("")
        self._await("SELECT count(*) FROM pg_stat_wal_receiver", "0", within)

    def reconnect(self, *, within: float = 30.0) -> None:
        """Receive from the primary again."""
        self._follow(f"{self._primary}?application_name=standby")
        self._await(
            "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'",
            "1",
            within,
        )

    def replayed(self) -> str:
        """The last WAL position (LSN) this standby has replayed."""
        return self.sql.query("SELECT pg_last_wal_replay_lsn()")

    def catch_up(self, primary: PostgresServer, *, within: float = 30.0) -> None:
        """Wait until everything the primary has written by now is replayed here."""
        target = primary.sql.query("SELECT pg_current_wal_flush_lsn()")
        self._await(f"SELECT pg_last_wal_replay_lsn() >= '{target}'::pg_lsn", "t", within)

    def promote(self, *, within: float = 60.0) -> None:
        """Make this standby a primary of a new timeline; returns when it takes writes."""
        self.sql.query(f"SELECT pg_promote(true, {int(within)})")
        self._await("SELECT pg_is_in_recovery()", "f", within)

    def _follow(self, address: str) -> None:
        self.sql.query(f"ALTER SYSTEM SET primary_conninfo = '{address}'")
        self.sql.query("SELECT pg_reload_conf()")

    def _await(self, question: str, answer: str, within: float) -> None:
        deadline = time.monotonic() + within
        while self.sql.query(question) != answer:
            if time.monotonic() > deadline:
                raise ServerUnavailable(f"The standby did not come to {answer!r} for: {question}")
            time.sleep(0.02)


def _lines(settings: Mapping[str, str]) -> str:
    return "".join(f"{key} = '{value}'\n" for key, value in settings.items())


def _locale(major: int) -> list[str]:
    common = ["--encoding=UTF8", "--locale=C"]
    return [*common, "--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else common
