"""One server process: started under a guard, found by recorded pid, ended together with everything it started.

Everything about a server is in its folder, so any process can attach to one that another process started: the pytest
workers of one run share servers, and a torture test's children may restart a server of their parent.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from soma_common.errors import ServerUnavailable
from soma_common.guard import Guard, Identity, Record
from soma_common.locks import SharedLock

_PAUSE = 0.02
_PATIENCE = 30.0  # seconds for a killed process to be gone
_ORDERLY = 30.0  # seconds for a server to end whose data last
LASTING = "lasting"
"""A file in a server's folder: its data outlive it, and the guard deletes nothing."""
_TAKEN = (
    "Address already in use",
    "BindException",
    "already bound",
    "Port already bound",
)


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server is started and asked to end. Times are seconds. ``orderly`` is for one whose data last."""

    command: Sequence[str]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop: signal.Signals = signal.SIGTERM
    grace: float = 20.0
    within: float = 120.0
    orderly: signal.Signals = signal.SIGTERM


class PortTaken(ServerUnavailable):
    """Another program took the port between its choice and its use: choose again."""


class ServerProcess:
    """The process behind a server's folder. Creating one registers us as a user of the folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.log_path = folder / "server.log"
        self._pids = folder / "pids.json"
        self.lasting = (folder / LASTING).exists()
        self._use = SharedLock(folder / "users.lock", within=60.0)

    @property
    def pid(self) -> int:
        """The server's process id. Raises ServerUnavailable if it was never started."""
        record = Record.read(self._pids)
        if record is None:
            raise ServerUnavailable(f"{self.name} was never started.")
        return record.server.pid

    @property
    def alive(self) -> bool:
        """True while the recorded process runs."""
        record = Record.read(self._pids)
        return record is not None and record.code is None and _running(record.server)

    def start(self, launch: Launch) -> None:
        """Start and wait for readiness. Raises PortTaken or ServerUnavailable with the end of the log."""
        already = self.log_path.stat().st_size if self.log_path.exists() else 0
        guard = Guard(
            users=self.folder / "users.lock",
            pids=self._pids,
            stop=launch.orderly if self.lasting else launch.stop,
            grace=_ORDERLY if self.lasting else launch.grace,
            user=launch.user,
            remove=None if self.lasting else self.folder,
        )
        guard.start(launch.command, log=self.log_path, env=launch.env)
        self._await_ready(launch, already)

    def wait(self, launch: Launch) -> None:
        """Until a server that another process has started is ready. Raises ServerUnavailable."""
        self._await_ready(launch, self.log_path.stat().st_size if self.log_path.exists() else 0)

    def _await_ready(self, launch: Launch, already: int) -> None:
        deadline = time.monotonic() + launch.within
        while (record := Record.read(self._pids)) is None or not launch.ready():
            if record is not None and record.code is not None:
                raise self._failure("ended while starting", already)
            if time.monotonic() > deadline:
                self.kill()
                raise self._failure(f"was not ready within {launch.within:g} s", already)
            time.sleep(_PAUSE)

    def _failure(self, what: str, already: int) -> ServerUnavailable:
        said = self.log_tail(since=already)
        kind = PortTaken if any(word in said for word in _TAKEN) else ServerUnavailable
        return kind(
            f"{self.name} {what}. The end of its log:\n{said}",
            cure=f"look into {self.log_path}.",
        )

    def log_tail(self, lines: int = 30, *, since: int = 0) -> str:
        """The last lines of the log, from byte ``since``."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def end(self, how: signal.Signals, *, within: float = 30.0) -> None:
        """Ask the server to end with a signal, and SIGKILL everything of it after ``within`` seconds."""
        if self.alive:
            family = self._family()
            self._signal([family[0]], signal.SIGCONT)
            self._signal([family[0]], how)
            self._signal(_survivors(family, within), signal.SIGKILL)
            _survivors(family, within)
        self._await_guard(within)

    def kill(self) -> None:
        """SIGKILL the server and every process it started, as a crash of the machine would."""
        if self.alive:
            family = self._frozen_family()
            self._signal(family, signal.SIGKILL)
            _survivors(family, _PATIENCE)
        self._await_guard(_PATIENCE)

    def pause(self) -> None:
        """SIGSTOP the server and every process it started."""
        self._signal(self._frozen_family(), signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``: SIGCONT."""
        self._signal(self._family(), signal.SIGCONT)

    def release(self) -> None:
        """Stop being a user of the folder; with the last user the guard ends the server and deletes the folder."""
        self._use.release()

    def abandon(self) -> None:
        """Give up a server that did not start: its data are deleted, unless they are to last; its log is kept."""
        self.kill()
        self.release()
        if self.lasting:
            return
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def close(self) -> None:
        """End the server now and delete its folder, whoever else may use it."""
        self.kill()
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _family(self) -> list[psutil.Process]:
        """The server first, then what it started. PostgreSQL's backends leave the process group, so pids it is."""
        try:
            server = psutil.Process(self.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess as error:
            raise ServerUnavailable(f"{self.name} is not running.", cure="start it again.") from error

    def _frozen_family(self) -> list[psutil.Process]:
        """The family of a stopped server, which cannot start another process behind our back."""
        self._signal(self._family()[:1], signal.SIGSTOP)
        return self._family()

    @staticmethod
    def _signal(processes: Sequence[psutil.Process], how: signal.Signals) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it ended by itself: that is what we wanted
                process.send_signal(how)

    def _await_guard(self, within: float) -> None:
        """The guard is the last to go: when it has ended, nothing of this start is left."""
        deadline = time.monotonic() + within
        while (record := Record.read(self._pids)) is not None and _running(record.guard):
            if time.monotonic() > deadline:
                raise ServerUnavailable(f"The guard of {self.name} does not notice that its server has ended.")
            time.sleep(_PAUSE)


def _survivors(processes: Sequence[psutil.Process], within: float) -> list[psutil.Process]:
    """Wait until all have ended, at most ``within`` seconds; return those that have not."""
    deadline = time.monotonic() + within
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return left


def _runs(process: psutil.Process) -> bool:
    """A zombie has ended, however long its parent takes to notice."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _running(who: Identity) -> bool:
    try:
        process = psutil.Process(who.pid)
    except psutil.NoSuchProcess:
        return False
    return _runs(process) and who.born in (None, Identity.of(who.pid).born)
