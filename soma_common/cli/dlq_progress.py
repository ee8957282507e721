"""How a re-drive goes on: a bar on a terminal, a line every five seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from soma_common.dlq.careful import Redrive

_EVERY = 5.0  # seconds between two lines

Show = Callable[[Redrive], None]


async def followed(steps: AsyncIterator[Redrive], total: int, *, quiet: bool) -> Redrive:
    """The last state of a re-drive of about ``total`` letters, showing the others on stderr."""
    state = Redrive()
    with _shown(total, quiet=quiet) as show:
        try:
            async for state in steps:
                show(state)
        except BaseException:
            if state.cursor is not None and not quiet:
                click.echo(f"broken off after {state.marked} letters; go on with: --after {state.cursor}", err=True)
            raise
    return state


@contextmanager
def _shown(total: int, *, quiet: bool) -> Iterator[Show]:
    if quiet:
        yield lambda state: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=max(1, total))
            yield lambda state: bar.update(task, completed=state.marked, description=_counts(state))
    else:
        yield _Lines().show


class _Lines:
    """A line now and then."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _EVERY

    def show(self, state: Redrive) -> None:
        """Say it if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            click.echo(_counts(state), err=True)


def _counts(state: Redrive) -> str:
    return f"{state.marked} asked for, {state.resolved} resolved, {state.failed} failed, {state.waiting} under way"
