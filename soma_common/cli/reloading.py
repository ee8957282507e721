"""Runs a command again whenever a Python file changes: for development."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import click

_LOOK: Final = 0.4  # seconds between two looks at the files
_SETTLE: Final = 0.2  # seconds in which an editor writes its other files
_SKIPPED: Final = {"__pycache__", "node_modules", "site-packages", "build", "dist"}
_MOST: Final = 20_000  # files; a tree with more is none that somebody writes

Seen = Mapping[str, tuple[int, int]]


def supervise(*, patience: float, folder: Path | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run this command without ``--reload``, anew after every change below a folder; its exit code in the end.

    Args:
        patience: seconds that a process gets to drain before it is killed.
        folder: what is watched, and where it runs; None: where we are.
        arguments: the command's; None: those of this process.
    """
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--reload"]
    return _Supervisor(folder or Path.cwd(), words, patience).run()


class _Supervisor:
    def __init__(self, folder: Path, words: Sequence[str], patience: float) -> None:
        self._folder, self._patience = folder, patience
        self._command = [sys.executable, "-m", "soma_common.cli.main", *words]
        self._ends = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        while True:
            seen = files(self._folder)
            with subprocess.Popen(self._command, cwd=self._folder, start_new_session=True) as child:
                changed = self._await_change(child, seen)
                self._stop(child)
            if self._ends:
                return child.returncode
            click.echo(f"{changed}: begins anew", err=True)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ends = True

    def _await_change(self, child: subprocess.Popen[bytes], seen: Seen) -> str:
        told = False
        while not self._ends:
            if child.poll() is not None and not told:
                told = True
                click.echo(f"it ended with exit code {child.returncode}: waits for a change", err=True)
            time.sleep(_LOOK)
            changed = difference(seen, files(self._folder))
            if changed:
                time.sleep(_SETTLE)
                return changed
        return ""

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        """Let it drain, then kill what is left of it."""
        if child.poll() is not None:
            return
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(self._patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def files(folder: Path) -> Seen:
    """The Python files below a folder, each with its time and size."""
    seen: dict[str, tuple[int, int]] = {}
    for path in _below(folder):
        try:
            stat = path.stat()
        except OSError:  # an editor has just moved it
            continue
        seen[str(path.relative_to(folder))] = (stat.st_mtime_ns, stat.st_size)
        if len(seen) >= _MOST:
            break
    return seen


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _SKIPPED and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(names) if name.endswith(".py"))


def difference(before: Seen, now: Seen) -> str:
    """The name of a file that came, went or changed; empty when none did."""
    return next((name for name in sorted({*before, *now}) if before.get(name) != now.get(name)), "")
