"""Processes by id and moment of birth: what was started here is ended, and never a later process of the same id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from soma_common.cli.stack import keeper
from soma_common.errors import ServerUnavailable
from soma_common.guard import Identity, Record

_PAUSE = 0.02
_GRACE = 5.0  # seconds for the keeper to go; it has nothing to do for that
_STARTING = 90.0


def recorded(pids: Path) -> Record | None:
    """What the guard of a server wrote down; None where nothing legible is."""
    try:
        return Record.read(pids)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def runs(who: Identity) -> bool:
    """Whether that very process runs. Where the system does not tell moments of birth, the id alone counts."""
    if who.pid <= 1:
        return False
    try:
        os.kill(who.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = Identity.of(who.pid)
    return not _is_zombie(who.pid) and (who.born is None or now.born == who.born)


def _is_zombie(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def await_end(who: Identity, within: float) -> bool:
    """Whether it ended within so many seconds."""
    deadline = time.monotonic() + within
    while runs(who):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


class Keeper:
    """Who uses the servers while no command does. ``record`` is where it writes itself down."""

    def __init__(self, record: Path) -> None:
        self._record = record

    @property
    def who(self) -> Identity | None:
        """The one that runs now."""
        try:
            told = json.loads(self._record.read_text())
            who = Identity(int(told[0]), None if told[1] is None else int(told[1]))
        except (OSError, ValueError, TypeError, IndexError, KeyError, RecursionError):
            return None
        return who if runs(who) else None

    def hold(self, locks: Iterable[Path]) -> None:
        """Let a new keeper use the servers of these locks, and end the one before it: no server notices.

        Raises:
            ServerUnavailable: a server that is ending does not end.
        """
        before = self.who
        command = [sys.executable, "-I", "-S", keeper.__file__, str(self._record), *map(str, locks)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", timeout=_STARTING, check=False
        )
        if done.returncode != 0:
            raise ServerUnavailable(
                f"The servers cannot be kept running: {done.stderr.strip()[-300:] or 'one of them is ending'}.",
                cure="try again in a minute; `somastack logs` shows what they said.",
            )
        if before is not None:
            end(before)

    def end(self) -> bool:
        """Let go of the servers; whether there was a keeper."""
        who = self.who
        if who is not None:
            end(who)
        self._record.unlink(missing_ok=True)
        return who is not None


def end(who: Identity) -> None:
    """SIGTERM, then SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not runs(who):
            return
        with suppress(ProcessLookupError):
            os.kill(who.pid, how)
        if await_end(who, _GRACE):
            return
