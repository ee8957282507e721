"""How commands show events, plans and progress: tables and bars on a terminal, lines elsewhere, JSON when asked."""

from __future__ import annotations

import asyncio
import getpass
import os
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from soma_common.escaping import json_text, plain
from soma_common.events.models import RecordedEvent
from soma_common.events.store import Page
from soma_common.replay.models import Plan
from soma_common.replay.models import Progress as Run
from soma_common.tasks import end

_EVERY = 5.0  # seconds between two lines of progress where there is no terminal
_FIELDS = (
    "position", "version", "event_id", "event_type", "schema_version", "tenant_id", "aggregate_type", "aggregate_id",
    "service_id", "correlation_id", "causation_id", "idempotency_key", "trace_id", "timestamp", "occurred_at",
    "recorded_at", "payload", "metadata",
)  # fmt: skip
_RUN = (
    "consumer", "mode", "source", "rate", "requested_by", "reason", "error", "created_at", "started_at", "ended_at",
)  # fmt: skip


def login() -> str:
    """Who runs the command; in a container whose user has no name, the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def as_json(event: RecordedEvent, *, indent: bool = False) -> str:
    """An event as one JSON object."""
    return json_text({name: getattr(event, name) for name in _FIELDS}, indent=indent)


def as_line(event: RecordedEvent) -> str:
    """An event as one line. What could move a terminal's cursor is shown as an escape."""
    return "  ".join(_cells(event))


async def show_events(pages: AsyncIterator[Page], *, json: bool) -> int | None:
    """Events as a table on a terminal, else one per line as the pages come; the last page's ``next_after``."""
    table = Table("position", "time", "type", "tenant", "key", "trace")
    in_table, more = not json and sys.stdout.isatty(), None
    async for page in pages:
        more = page.next_after
        for event in page:
            if in_table:
                table.add_row(*map(Text, _cells(event)))
            else:
                click.echo(as_json(event) if json else as_line(event))
    if in_table:
        Console().print(table)
    return more


def show_plan(plan: Plan, *, json: bool) -> None:
    """What a replay would read."""
    if json:
        days = {str(day): count for day, count in plan.by_day.items()}
        told = {"consumer": plan.consumer, "mode": plan.mode.value, "total": plan.total, "known": plan.known}
        click.echo(json_text(told | {"by_type": plan.by_type, "by_service": plan.by_service, "by_day": days}))
        return
    click.echo(f"{plan.mode} replay of {plain(plan.consumer)}: {plan.total} events, {plan.known} known to its inbox")
    for title, counts in (("type", plan.by_type), ("service", plan.by_service), ("day", plan.by_day)):
        for name, count in counts.items():
            click.echo(f"  {title:<8} {plain(str(name)):<40} {count:>12}")


def show_state(run: Run, *, json: bool) -> None:
    """What a run was brought to."""
    if json:
        _tell(run, json=True)
    else:
        click.echo(f"replay {run.run_id} is {run.state}")


def show_runs(runs: Sequence[Run], *, json: bool) -> None:
    """Runs as a table on a terminal, else one per line."""
    if json:
        for run in runs:
            click.echo(json_text({name: getattr(run, name) for name in _RUN} | _told(run)))
        return
    names = ["id", "consumer", "mode", "source", "state", "read/applied", "from when", "who"]
    rows = [[run.run_id, run.consumer, run.mode, run.source, run.state, f"{run.counts.read}/{run.counts.applied}",
             f"{run.created_at.astimezone(UTC):%Y-%m-%d %H:%M}Z", run.requested_by or "-"] for run in runs]  # fmt: skip
    show_table(names, rows)


def show_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal, else tab-separated lines."""
    cells = [[plain(str(cell if cell is not None else "-")) for cell in row] for row in rows]
    console = Console()
    if not console.is_terminal:
        for row in cells:
            click.echo("\t".join(row))
        return
    # An id is what the next command wants: it is never folded.
    table = Table(*(Column(name, overflow="fold", no_wrap=name == "id") for name in names))
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


async def watch(steps: AsyncIterator[Run], *, last: Run, json: bool) -> None:
    """Follow a run to its end: a bar on a terminal, else a line every five seconds and at the end.

    Also while a step takes long: then the ``last`` known state is told again.
    """
    if not json and sys.stderr.isatty():
        await _bar(steps)
        return

    async def tell() -> None:
        while True:
            await asyncio.sleep(_EVERY)
            _tell(last, json=json)

    telling = asyncio.create_task(tell())
    try:
        async for run in steps:
            last = run
            if telling.done():  # nobody reads it any more
                break
    finally:
        await end(telling)
    _tell(last, json=json)


async def _bar(steps: AsyncIterator[Run]) -> None:
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        async for run in steps:
            bar.update(task, completed=run.fraction, description=_counts(run))
    _tell(run, json=False)


def _tell(run: Run, *, json: bool) -> None:
    if json:
        click.echo(json_text(_told(run)))
    else:
        click.echo(f"{run.state} {run.fraction:.0%}: {_counts(run)}")


def _told(run: Run) -> dict[str, Any]:
    counts = {name: getattr(run.counts, name) for name in ("read", "applied", "repeated", "skipped", "held")}
    return {"run_id": run.run_id, "state": run.state.value, "fraction": round(run.fraction, 4)} | counts


def _counts(run: Run) -> str:
    c = run.counts
    return f"{c.read} read, {c.applied} applied, {c.repeated} known, {c.skipped} without handler, {c.held} held"


def _cells(event: RecordedEvent) -> list[str]:
    moment = f"{event.timestamp:%Y-%m-%d %H:%M:%S.%f}"[:-3] + "Z"
    key = f"{event.aggregate_type}/{event.aggregate_id}@{event.version}"
    cells = [str(event.position), moment, event.event_type, event.tenant_id, key, event.trace_id[:8]]
    return [plain(cell) for cell in cells]
