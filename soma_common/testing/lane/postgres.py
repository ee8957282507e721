"""PostgreSQL over TCP, from the wheel's binaries and ``deployments/config/postgres/postgresql.conf``."""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from soma_common.errors import ServerUnavailable
from soma_common.postgres.binaries import PostgresBinaries, account_for, find_binaries
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch, PortTaken, ServerProcess
from soma_common.testing.lane.sql_tools import SqlTools

Mode = Literal["smart", "fast", "immediate"]
_STOP: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_DRAWS = 8  # how often a lost race for a port is run again


@dataclass(frozen=True, slots=True)
class _Settings:
    """What another process needs to attach to the server."""

    major: int
    port: int
    password: str


class PostgresServer:
    """A PostgreSQL cluster of our own: make with ``start``, ``attach`` or as a standby; a context manager."""

    def __init__(self, folder: Path, settings: _Settings) -> None:
        self.process = ServerProcess(f"PostgreSQL {settings.major}", folder)
        self.major, self.port = settings.major, settings.port
        self._password = settings.password
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
        try:
            server._initialise()
            server.configure(settings or {})
        except BaseException:
            server.process.abandon()
            raise
        return server._launch_first()

    @classmethod
    def attach(cls, folder: Path) -> PostgresServer:
        """The server that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Settings(**json.loads((folder / "settings.json").read_text())))

    @property
    def folder(self) -> Path:
        return self.process.folder

    @property
    def data(self) -> Path:
        return self.process.folder / "data"

    @property
    def log_path(self) -> Path:
        return self.process.log_path

    @property
    def dsn(self) -> str:
        """Address of the database ``postgres``, as superuser."""
        return f"postgresql://postgres:{self._password}@{LOOPBACK}:{self.port}/postgres"

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
        lines = "".join(f"{key} = '{value}'\n" for key, value in settings.items())
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(lines)

    def start_again(self, *, within: float = 60.0) -> None:
        """Start the stopped or killed server on the same folder and port; wait for its crash recovery."""
        self.process.start(self._launch(within))

    def stop(self, mode: Mode = "fast") -> None:
        """Stop the server as ``pg_ctl stop -m mode``; the data stay."""
        self.process.end(_STOP[mode])

    def restart(self, mode: Mode = "fast") -> None:
        """Stop and start, as ``pg_ctl restart -m mode``; ``immediate`` skips the checkpoint and needs recovery."""
        self.stop(mode)
        self.start_again()

    def kill(self) -> None:
        """SIGKILL the server and all its backends."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP every process of the server."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT every process of the server."""
        self.process.resume()

    def close(self) -> None:
        """End the server and delete its folder."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def standby(self, *, name: str = "standby", settings: Mapping[str, str] | None = None) -> Standby:
        """A streaming standby of this server, started and connected."""
        folder = scratch_folder(name, self.folder.parent)
        copy = Standby(folder, _Settings(self.major, free_port(), self._password), primary=self.dsn)
        try:
            copy.fetch(self.dsn, name)
            copy.configure(settings or {})
        except BaseException:
            copy.process.abandon()
            raise
        copy._launch_first()
        return copy

    def run_tool(self, program: str, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Run one of PostgreSQL's programs as the account of the cluster. Raises ServerUnavailable on failure."""
        done = self._account.run([self._binaries.path(program), *arguments], env=env)
        if done.returncode != 0:
            raise ServerUnavailable(f"{program} failed: {done.stderr.strip()}")
        return done.stdout

    def _initialise(self) -> None:
        self.data.mkdir(mode=0o700)
        self._account.own(self.data)
        secret = self.data.parent / "password"
        secret.touch(mode=0o600)
        self._account.own(secret)
        secret.write_text(self._password)
        access = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(secret)]
        self.run_tool(
            "initdb",
            "-D",
            str(self.data),
            "--no-sync",
            *access,
            *_locale(self.major),
            "--data-checksums",
        )
        secret.unlink()
        shared = deployments_folder() / "config" / "postgres" / "postgresql.conf"
        (self.data / "postgresql.conf").write_text(shared.read_text() + "\n# Overrides of this server\n")

    def _launch_first(self) -> PostgresServer:
        for _ in range(_DRAWS):
            self.configure(self._overrides())
            self._remember()
            try:
                self.process.start(self._launch(60.0))
            except PortTaken:
                self.port = free_port()
            except BaseException:
                self.process.abandon()
                raise
            else:
                return self
        self.close()
        raise ServerUnavailable(f"Lost the race for a port {_DRAWS} times.", cure="try again.")

    def _overrides(self) -> dict[str, str]:
        sockets = ""  # TCP only: no path-length limit, no file to clean up
        return {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": sockets,
        }

    def _remember(self) -> None:
        known = {"major": self.major, "port": self.port, "password": self._password}
        file = self.folder / "settings.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(known))

    def _launch(self, within: float) -> Launch:
        command = [self._binaries.path("postgres"), "-D", str(self.data)]
        return Launch(
            command=self._account.command(command, dies=signal.SIGQUIT),
            ready=self.sql.answers,
            user=self._account.switched_by_parent,
            stop=signal.SIGQUIT,  # nobody will read these data again: no checkpoint, but shared memory is given back
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


def _locale(major: int) -> list[str]:
    common = ["--encoding=UTF8", "--locale=C"]
    return [*common, "--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else common
