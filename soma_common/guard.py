"""Ends a server when nobody uses it any more: run as a program, the guard is the server's parent process.

Every user of a server holds a shared ``flock`` on one file. The guard waits for the exclusive lock on it, which the
kernel grants when the last user has let go of the file, left, or been killed with SIGKILL: no pid lists, no polling.
Then it stops the server, and deletes what it was told to delete. Standard library only, so that it starts fast
(``python -I -S guard.py``) and never depends on how its starter found this package.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Guard:
    """How a server is to be guarded.

    ``users`` is the file its users lock, ``pids`` receives the ``Record``, ``stop`` asks the server to end, ``grace``
    is how many seconds it then gets before SIGKILL, ``user`` is the account it runs as, and ``remove`` is a folder
    deleted once the last user is gone.
    """

    users: Path
    pids: Path
    stop: signal.Signals
    grace: float
    user: str | None = None
    remove: Path | None = None

    def start(self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        """Start ``command`` in the background under a guard; what both say goes to the end of ``log``."""
        self.pids.unlink(missing_ok=True)
        with log.open("ab") as file:
            subprocess.run(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    __file__,
                    *self._options(),
                    "--",
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(env or {})},
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for the program, not for its servers
                check=True,
            )

    def _options(self) -> list[str]:
        options = ["--users", str(self.users), "--pids", str(self.pids)]
        options += ["--stop", self.stop.name, "--grace", str(self.grace)]
        options += ["--user", self.user] if self.user else []
        return options + (["--remove", str(self.remove)] if self.remove else [])


class Identity(NamedTuple):
    """A process, told apart from a later one that was given the same id. ``born`` is in ticks since boot."""

    pid: int
    born: int | None

    @classmethod
    def of(cls, pid: int) -> Identity:
        """``born`` is None where there is no /proc or no such process."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return cls(pid, None)
        return cls(pid, int(stat.rpartition(")")[2].split()[19]))


@dataclass(frozen=True, slots=True)
class Record:
    """What a guard has written down: itself and the server, and the server's exit status in the end."""

    guard: Identity
    server: Identity
    code: int | None = None

    @classmethod
    def read(cls, pids: Path) -> Record | None:
        """None before the guard has come to start the server."""
        try:
            told = json.loads(pids.read_text())
        except FileNotFoundError:
            return None
        return cls(Identity(*told["guard"]), Identity(*told["server"]), told["code"])

    def write(self, pids: Path) -> None:
        """A reader sees the old record or this one, never half of it."""
        fresh = pids.with_suffix(".new")
        fresh.write_text(json.dumps({"guard": self.guard, "server": self.server, "code": self.code}))
        fresh.replace(pids)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="guard", description="Run a server until its last user is gone.")
    parser.add_argument("--users", type=Path, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--stop", type=lambda name: signal.Signals[name], required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--user")
    parser.add_argument("--remove", type=Path)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _die_with_parent(how: signal.Signals) -> Callable[[], None]:
    """On Linux the kernel also ends the server when the guard itself is killed."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)


def _start(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    account = {"user": args.user, "group": _group_of(args.user), "extra_groups": []} if args.user else {}
    try:
        # One thread and nothing imported that forks: the window between fork and exec is safe for prctl.
        server = subprocess.Popen(
            args.command,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent(args.stop),
            **account,
        )
    except OSError:
        # 127: as a shell says "cannot be executed"; the reason is in the log.
        Record(Identity.of(os.getpid()), Identity(0, None), 127).write(args.pids)
        raise
    Record(Identity.of(os.getpid()), Identity.of(server.pid)).write(args.pids)
    return server


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _end(server: subprocess.Popen[bytes], how: signal.Signals, grace: float) -> None:
    server.send_signal(signal.SIGCONT)
    server.send_signal(how)
    try:
        server.wait(grace)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _end_when_unused(server: subprocess.Popen[bytes], args: argparse.Namespace, users: int) -> None:
    fcntl.flock(users, fcntl.LOCK_EX)
    _end(server, args.stop, args.grace)
    if args.remove is not None:
        shutil.rmtree(args.remove, ignore_errors=True)
    os._exit(0)


def main(argv: Sequence[str]) -> None:
    """Run the server until it ends or nobody uses it, as a process that is nobody's child."""
    args = _arguments(argv)
    if os.fork():
        return  # the starter waits for this process only; whoever stops using the server has no child to reap
    users = os.open(args.users, os.O_RDWR | os.O_CREAT, 0o600)
    server = _start(args)
    watcher = threading.Thread(target=_end_when_unused, args=(server, args, users), daemon=True)
    watcher.start()
    code = server.wait()
    if _unused(args.users):
        watcher.join()
    Record(Identity.of(os.getpid()), Identity(server.pid, None), code).write(args.pids)


def _unused(users: Path) -> bool:
    """True when the watcher has the lock already: then the cleaning up is its work, and must be waited for."""
    again = os.open(users, os.O_RDWR)
    try:
        fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(again)
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
