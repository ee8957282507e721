"""The processes of a run: started, killed, paused, started again, and never left behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
POISONED = 77  # how a process ends that met poison: not by its own fault
_STARTING = 5.0  # seconds that Python may take to import everything on a busy machine


def die_with_parent() -> None:
    """Called first in every child: the kernel ends it when the run is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


async def until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Do it until SIGTERM."""
    task = asyncio.create_task(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


@dataclass(eq=False, slots=True)
class Child:
    """One place in the run, filled by one process after another. ``role`` is a module of this package."""

    role: str
    name: str
    folder: Path
    lives: int = 0
    paused: bool = False
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    asked: float = 0.0
    failures: list[str] = field(default_factory=list)
    poisoned: int = 0

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """A new process; it knows its number of life, so that names never repeat."""
        self.lives += 1
        self.started = time.monotonic()
        command = [sys.executable, "-m", f"tests.torture.{self.role}", str(self.folder), self.name, str(self.lives)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True
            )

    def kill(self) -> bool:
        """SIGKILL; whether there was something to kill."""
        alive = self.running
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.paused = None, False
        return alive

    def pause(self) -> bool:
        """SIGSTOP."""
        if self.running and not self.paused:
            self._signal(signal.SIGSTOP)
            self.paused = True
            return True
        return False

    def resume(self) -> None:
        """SIGCONT."""
        if self.paused and self.running:
            self._signal(signal.SIGCONT)
        self.paused = False

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self.resume()
        self.asked = time.monotonic()
        if self.running:
            self._signal(signal.SIGTERM)

    def await_end(self, within: float) -> None:
        """Wait for a graceful end; a process that does not come to it, or ends badly, is a failure."""
        if self.process is None:
            return
        try:
            code = self.process.wait(within)
            # A process that was only just starting had no handler yet.
            if code not in (0, POISONED) and not (code == -signal.SIGTERM and self.asked - self.started < _STARTING):
                self.fail(f"ended with status {code}")
        except subprocess.TimeoutExpired:
            self.fail(f"did not stop within {within:.0f} s of SIGTERM")
            self.kill()
        self.process = None

    def revive(self) -> None:
        """Start it again if it ended by itself, which is a failure unless poison did it."""
        if self.process is None or self.process.poll() is None:
            return
        if self.process.returncode == POISONED:
            self.poisoned += 1
        else:
            self.fail(f"ended by itself with status {self.process.returncode}")
        self.start()

    def fail(self, what: str) -> None:
        """Note what went wrong, with the end of the log."""
        tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] if self.log.exists() else []
        self.failures.append(f"{self.name}.{self.lives} {what}: {' '.join(tail)[-300:]}")

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def stop_all(children: Sequence[Child], *, within: float = 30.0) -> None:
    """Ask all of them to stop, then wait for each."""
    for child in children:
        child.ask_to_stop()
    end = time.monotonic() + within
    for child in children:
        child.await_end(max(1.0, end - time.monotonic()))


def kill_all(children: Sequence[Child]) -> None:
    """SIGKILL whatever still runs."""
    for child in children:
        child.kill()
