"""The embedded PostgreSQL of standalone mode: a real server in a folder, shared by every process that opens it.

The first process to open a folder starts the server, the last one to leave stops it. "Leaving" is what the kernel
sees: each user holds a shared lock on a file, so a process killed with SIGKILL has left too, and the others go on.
Only a Unix socket is opened, in a folder that only the account may enter; nothing listens on the network.
``fsync`` is on: what was committed survives a power cut.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from soma_common.errors import EmbeddedPostgresError
from soma_common.guard import Guard, Record
from soma_common.locks import SharedLock, exclusive
from soma_common.postgres.binaries import (
    Account,
    PostgresBinaries,
    account_for,
    find_binaries,
)

MAJOR = 18
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of sockaddr_un.sun_path without its final NUL
_SOCKET_NAME = "/run/.s.PGSQL.5432"
_LEAST_FREE_MIB = 128  # a new cluster is 40 MiB, its first two WAL segments 32 MiB; the rest is for the first hour
_LARGEST_LOG = 8 * 1024 * 1024  # bytes
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "logging_collector": "off",
    "log_checkpoints": "off",  # the log file is ours to bound; one line every five minutes would fill it
}
# What PostgreSQL says, what it means, and what helps. The first match wins.
_CAUSES = (
    (
        r"No space left on device|Disk quota exceeded|File too large",
        "The disk is full.",
        "free some space.",
    ),
    (
        r"Read-only file system",
        "The file system is read-only.",
        "choose a folder on a writable file system.",
    ),
    (
        r"has wrong ownership|Permission denied|Operation not permitted",
        "The account that runs PostgreSQL may not use the folder.",
        "choose a folder of your own, or give this one to the account that runs the program.",
    ),
    (
        r"could not resize shared memory|could not map anonymous shared memory|could not create shared memory",
        "There is not enough shared memory.",
        "give the container or machine at least 256 MiB (docker: --shm-size).",
    ),
    (
        r"invalid checkpoint record|could not locate a valid checkpoint|PANIC",
        "The database files are damaged.",
        "keep the folder as it is, and restore a backup into a new one.",
    ),
)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The files of one embedded folder."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "postgres.log"

    @property
    def users(self) -> Path:
        return self.folder / "users.lock"

    @property
    def starting(self) -> Path:
        return self.folder / "start.lock"

    @property
    def pids(self) -> Path:
        return self.folder / "pids.json"


class EmbeddedPostgres:
    """A PostgreSQL 18 server in ``folder``, started on demand and shared between processes.

    Usable as a context manager. ``within`` bounds, in seconds, every wait for the server.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        database: str = "soma",
        within: float = 60.0,
    ) -> None:
        self._layout = _Layout(Path(folder).absolute())
        self._database = database
        self._within = within
        self._use: SharedLock | None = None

    @property
    def dsn(self) -> str:
        """The address for any PostgreSQL driver; valid while started."""
        socket = quote(str(self._layout.run), safe="/")
        return f"postgresql://postgres@/{quote(self._database)}?host={socket}"

    @property
    def log_path(self) -> Path:
        """What the server said, as text."""
        return self._layout.log

    @property
    def runs(self) -> bool:
        """Whether a server has its socket in the folder; nothing is started or asked for it."""
        return os.path.exists(self._layout.run / ".s.PGSQL.5432")  # False where it may not be looked at

    def start(self) -> str:
        """Open the folder, starting the server unless another process has; return the DSN. Twice is safe.

        Raises MissingDependency without the wheel and EmbeddedPostgresError for everything that is wrong with the
        folder: unwritable, path too long, disk full, another major version, damaged.
        """
        if self._use is None:
            binaries = find_binaries(MAJOR)
            _prepare(self._layout)
            self._use = self._enter()
            try:
                self._ensure_running(_Cluster(self._layout, binaries, self._within))
            except BaseException:
                self.stop()
                raise
        return self.dsn

    def stop(self) -> None:
        """Leave the folder; the server ends a moment later if nobody else uses it. Twice is safe."""
        if self._use is not None:
            self._use.release()
            self._use = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _enter(self) -> SharedLock:
        try:
            return SharedLock(self._layout.users, within=self._within)
        except TimeoutError as error:
            raise EmbeddedPostgresError(
                f"The server of {self._layout.folder} did not end within {self._within:g} s.",
                cure=f"look into {self._layout.log}, then try again.",
            ) from error

    def _ensure_running(self, cluster: _Cluster) -> None:
        try:
            with exclusive(self._layout.starting, within=self._within):
                if not cluster.answers():
                    cluster.launch()
                cluster.ensure_database(self._database)
        except TimeoutError as error:
            raise EmbeddedPostgresError(
                f"Another process has been starting the server of {self._layout.folder} for too long.",
                cure=f"look into {self._layout.log}.",
            ) from error


class _Cluster:
    """The server behind a folder: making, starting and asking it. Called under the start lock."""

    def __init__(self, layout: _Layout, binaries: PostgresBinaries, within: float) -> None:
        self._layout, self._binaries, self._within = layout, binaries, within
        self._account: Account = account_for(binaries, layout.data)

    def answers(self) -> bool:
        """True when the server takes a query."""
        return self._psql("postgres").returncode == 0

    def launch(self) -> None:
        self._check_major()
        if not (self._layout.data / "PG_VERSION").exists():
            self._initialise()
        self._forget_stale_pid()
        _rotate(self._layout.log)
        self._spawn()
        self._wait()

    def ensure_database(self, name: str) -> None:
        if self._psql(name).returncode == 0:
            return
        command = [
            self._binaries.path("createdb"),
            "-h",
            str(self._layout.run),
            "-U",
            "postgres",
            name,
        ]
        self._check(self._account.run(command), f"create the database {name!r}")

    def _psql(self, database: str) -> subprocess.CompletedProcess[str]:
        where = ["-h", str(self._layout.run), "-U", "postgres", "-d", database]
        return self._account.run([self._binaries.path("psql"), "-XAtq", *where, "-c", "SELECT 1"])

    def _check_major(self) -> None:
        file = self._layout.data / "PG_VERSION"
        found = file.read_text().strip() if file.exists() else str(MAJOR)
        if found != str(MAJOR):
            raise EmbeddedPostgresError(
                f"The folder {self._layout.folder} was written by PostgreSQL {found}; this is PostgreSQL {MAJOR}.",
                cure=f"dump it with PostgreSQL {found} (pg_dump) and restore it into a new folder, "
                f"run pg_upgrade on {self._layout.data}, or name another folder.",
            )

    def _initialise(self) -> None:
        """Make the cluster beside its place and move it there whole: a killed start leaves no half of one."""
        _check_space(self._layout.folder)
        # A name of its own: where the starter was killed, its initdb may still be at work, and write into the old one.
        fresh = self._layout.folder / f"data.new.{secrets.token_hex(4)}"
        for folder in (*self._layout.folder.glob("data.new*"), self._layout.data):
            shutil.rmtree(folder, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._account.own(fresh)
        locale = [
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        access = [
            "-U",
            "postgres",
            "-A",
            "trust",
            "--data-checksums",
        ]  # the socket's folder is the access control
        done = self._account.run([self._binaries.path("initdb"), "-D", str(fresh), *access, *locale])
        self._check(done, "create the database files")
        fresh.rename(self._layout.data)

    def _forget_stale_pid(self) -> None:
        """After a reboot the recorded pid may belong to an unrelated program, and PostgreSQL would refuse to start."""
        file = self._layout.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            pid = file.read_text().split("\n", 1)[0].strip()
            if pid.isdigit() and _works_elsewhere(int(pid), self._layout.data):
                file.unlink()

    def _spawn(self) -> None:
        self._layout.run.mkdir(mode=0o700, exist_ok=True)
        self._account.own(self._layout.run)
        settings = {**_SETTINGS, "unix_socket_directories": f'"{self._layout.run}"'}
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        server = [self._binaries.path("postgres"), "-D", str(self._layout.data), *flags]
        stop = signal.SIGINT  # "fast" shutdown: sessions are ended, a checkpoint is written
        guard = Guard(
            users=self._layout.users,
            pids=self._layout.pids,
            stop=stop,
            grace=self._within,
            user=self._account.switched_by_parent,
        )
        guard.start(self._account.command(server, dies=stop), log=self._layout.log)

    def _wait(self) -> None:
        """Wait for the first answer. A recovery after a crash may take its time: ``within`` bounds it."""
        deadline = time.monotonic() + self._within
        while not self.answers():
            record = Record.read(self._layout.pids)
            if record is not None and record.code is not None:
                raise _explained(
                    f"start PostgreSQL in {self._layout.folder}",
                    _tail(self._layout.log),
                )
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"PostgreSQL in {self._layout.folder} gave no answer within {self._within:g} s.",
                    cure=f"look into {self._layout.log}; a long crash recovery goes on by itself, try again.",
                )
            time.sleep(0.02)

    def _check(self, done: subprocess.CompletedProcess[str], what: str) -> None:
        if done.returncode != 0:
            raise _explained(f"{what} in {self._layout.folder}", done.stderr + done.stdout)


def _prepare(layout: _Layout) -> None:
    """Make the folder, and refuse one that cannot work before anything is written."""
    longest = _LONGEST_SOCKET - len(_SOCKET_NAME)
    if len(os.fsencode(layout.folder)) > longest:
        raise EmbeddedPostgresError(
            f"The path {layout.folder} is too long for a Unix socket ({len(os.fsencode(layout.folder))} bytes).",
            cure=f"choose a folder whose absolute path has at most {longest} bytes.",
        )
    with _named(layout.folder):
        if not layout.folder.exists():
            layout.folder.mkdir(parents=True)
            layout.folder.chmod(0o711)  # to be passed through, not to be listed
        probe = layout.folder / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedPostgresError(
            f"The folder {folder} cannot be written: {error.strerror}.",
            cure="choose another folder, or mend its permissions or its disk.",
        ) from error


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free // (1024 * 1024)
    if free < _LEAST_FREE_MIB:
        raise EmbeddedPostgresError(
            f"The disk of {folder} is full: {free} MiB are free, a new database needs {_LEAST_FREE_MIB} MiB.",
            cure="free some space, or choose a folder on another disk.",
        )


def _works_elsewhere(pid: int, data: Path) -> bool:
    """True when a process ``pid`` runs and is surely not this cluster's: a server's working folder is its data."""
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) != data.resolve()
    except OSError:  # no such process, or no /proc: PostgreSQL judges by itself
        return False


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > _LARGEST_LOG:
        log.replace(log.with_suffix(".log.1"))


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _explained(what: str, said: str) -> EmbeddedPostgresError:
    """PostgreSQL's own words turned into a cause and a cure; the words are kept."""
    words = " | ".join(line.strip() for line in said.strip().splitlines()[-4:])
    for pattern, cause, cure in _CAUSES:
        if re.search(pattern, said):
            return EmbeddedPostgresError(f"Could not {what}. {cause} PostgreSQL said: {words}", cure=cure)
    return EmbeddedPostgresError(f"Could not {what}. PostgreSQL said: {words}")
