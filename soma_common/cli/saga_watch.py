"""A saga as it goes on: redrawn on a terminal, a line per entry of its journal elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

import click
from rich.console import Console, RenderableType
from rich.live import Live

from soma_common.cli.saga_output import entry_line, pictured, title
from soma_common.cli.tables import screen
from soma_common.sagas.models import ENDED
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.views import SagaView

_EVERY: Final = 0.5  # seconds between two looks
_FEWEST: Final = 3  # lines of the timeline, however small the terminal


async def watch(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> None:
    """Show a saga until it ended."""
    if sys.stdout.isatty() and not screen().is_dumb_terminal:
        await _redraw(orchestrator, saga_id)
    else:
        await _append(orchestrator, saga_id)


async def _redraw(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> None:
    console, view = screen(), None
    try:
        # No thread draws: what is shown is what was read last. Nothing is redirected: signs ask what stdout takes.
        with Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            async for view in _views(orchestrator, saga_id):
                live.update(_fitting(console, view), refresh=True)
    finally:  # the whole of it stays on the terminal
        if view is not None:
            console.print(pictured(view), crop=False)


def _fitting(console: Console, view: SagaView) -> RenderableType:
    """A saga with as much of its timeline as the terminal has room for."""
    beside = len(console.render_lines(pictured(view, lines=0), pad=False))
    return pictured(view, lines=max(_FEWEST, console.height - beside - 1))


async def _append(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> None:
    told: int | None = None
    async for view in _views(orchestrator, saga_id):
        if told is None:
            title(screen(), view)
        for entry in view.journal[told or 0 :]:
            click.echo(entry_line(view, entry))
        told = len(view.journal)


async def _views(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> AsyncIterator[SagaView]:
    while True:
        view = await orchestrator.get_saga(saga_id)
        yield view
        if view.status in ENDED:
            return
        await asyncio.sleep(_EVERY)
