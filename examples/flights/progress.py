"""What is going on while it goes on: bars on a terminal, a line every two seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich import progress as bars
from rich.console import Console

from examples.flights.chaos import Kill

_EVERY = 2.0  # seconds between two plain lines


class Progress:
    """Shows events published and applied, and each kill. Usable as a context manager."""

    def __init__(self, console: Console, events: int, kills: int, kinds: Sequence[str]) -> None:
        self._console, self._events, self._kills = console, events, kills
        self._begun = self._shown = time.monotonic()
        columns = (bars.TextColumn("{task.description:>10}"), bars.BarColumn(40), bars.MofNCompleteColumn())
        self._bars = bars.Progress(*columns, bars.TimeElapsedColumn(), console=console, transient=True)
        self._tasks = {name: self._bars.add_task(name, total=events) for name in ("published", "applied")}

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def say(self, text: str, style: str = "dim") -> None:
        """A line that stays."""
        since = time.monotonic() - self._begun
        self._console.print(f"{since:6.1f} s  {text}", style=style, markup=False, highlight=False, soft_wrap=True)

    def killed(self, kill: Kill) -> None:
        """A kill, and the stage it hit."""
        self.say(
            f"SIGKILL {kill.number:>2}/{self._kills} {kill.kind} {kill.pid} {kill.where}, "
            f"{kill.outstanding:,} events outstanding",
            style="red",
        )

    def at(self, published: int, applied: int) -> None:
        """How far it is."""
        if self._console.is_terminal:
            self._bars.update(self._tasks["published"], completed=published)
            self._bars.update(self._tasks["applied"], completed=applied)
        elif time.monotonic() - self._shown > _EVERY:
            self._shown = time.monotonic()
            self.say(f"{published:,} of {self._events:,} events published, {applied:,} applied", style="")
