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
from collections.abc import Callable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def guard_command(
    command: Sequence[str],
    *,
    users: Path,
    pids: Path,
    stop: signal.Signals,
    grace: float,
    user: str | None = None,
    remove: Path | None = None,
) -> list[str]:
    """The argument list that runs ``command`` under a guard.

    ``users`` is the file the users lock, ``pids`` receives ``{"guard": pid, "server": pid}``, ``stop`` asks the
    server to end, ``grace`` is how many seconds it gets before SIGKILL, ``user`` is the account it runs as, and
    ``remove`` is a folder deleted once the last user is gone.
    """
    options = ["--users", str(users), "--pids", str(pids), "--stop", stop.name, "--grace", str(grace)]
    options += ["--user", user] if user else []
    options += ["--remove", str(remove)] if remove else []
    return [sys.executable, "-I", "-S", __file__, *options, "--", *command]


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
    # One thread and nothing imported that forks: the window between fork and exec is safe for prctl.
    server = subprocess.Popen(
        args.command,
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent(args.stop),
        **account,
    )
    _write_whole(args.pids, json.dumps({"guard": os.getpid(), "server": server.pid}))
    return server


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


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


def main(argv: Sequence[str]) -> int:
    """Run the server; return its exit status, or 0 when it was ended because nobody used it."""
    args = _arguments(argv)
    users = os.open(args.users, os.O_RDWR | os.O_CREAT, 0o600)
    server = _start(args)
    watcher = threading.Thread(target=_end_when_unused, args=(server, args, users), daemon=True)
    watcher.start()
    code = server.wait()
    if not _unused(args.users):
        return code
    watcher.join()
    return 0


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
    sys.exit(main(sys.argv[1:]))
