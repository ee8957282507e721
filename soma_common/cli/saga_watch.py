"""A saga as it goes on: redrawn on a terminal, a line per entry of its journal elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

import click
from rich.live import Live

from soma_common.cli.saga_output import entry_line, pictured, title
from soma_common.cli.tables import screen
from soma_common.sagas.models import ENDED
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.views import SagaView

_EVERY: Final = 0.5  # seconds between two looks
_AROUND: Final = 24  # lines of a terminal beside the timeline
_FEWEST: Final = 5  # lines of the timeline


async def watch(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> None:
    """Show a saga until it ended."""
    if screen().is_terminal:
        await _redraw(orchestrator, saga_id)
    else:
        await _append(orchestrator, saga_id)


async def _redraw(orchestrator: SagaOrchestrator, saga_id: UUID | str) -> None:
    console = screen()
    # No thread draws: what is shown is what was read last. In the end the whole saga stays on the terminal.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        async for view in _views(orchestrator, saga_id):
            live.update(pictured(view, lines=max(_FEWEST, console.height - _AROUND)), refresh=True)
    console.print(pictured(view), crop=False)


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
