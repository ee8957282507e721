"""``somastack status``: every component, and whether it is well."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping

import click
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from soma_common.cli.examples import examples
from soma_common.cli.interrupting import interruptible
from soma_common.cli.stack.health import Row, down, look
from soma_common.cli.stack.places import effective
from soma_common.cli.tables import add, plain_table, screen
from soma_common.escaping import json_text, plain
from soma_common.moments import took

_COLUMNS = ("component", "state", "version", "lag", "disk", "answered in", "detail")


@click.command(epilog=examples(
    "somastack status", "a table on a terminal, a line per component in a pipe",
    "somastack status --watch", "again every two seconds, until Ctrl-C",
    "somastack status --json && deploy", "go on when everything is up",
))  # fmt: skip
@click.option("--watch", "watching", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(0.2, 3600), help="Seconds, for --watch.")
@click.option("--within", default=5.0, show_default=True, type=click.FloatRange(0.1, 60), help="Seconds for an answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(*, watching: bool, every: float, within: float, as_json: bool) -> None:
    """Reachability, version, lag and disk of every component. Nothing is started.

    The components are those of the environment, else those that `somastack up` started in SOMA_FOLDER.

    Exit codes: 0 everything is up, 1 something is down.
    """
    env = effective(os.environ)
    if not watching:
        rows = asyncio.run(look(env, within))
        _show(rows, as_json=as_json)
        sys.exit(1 if down(rows) else 0)
    interruptible(lambda: _watch(env, every, within, as_json=as_json))


async def _watch(env: Mapping[str, str], every: float, within: float, *, as_json: bool) -> None:
    console = screen()
    if as_json or not console.is_terminal or console.is_dumb_terminal:
        while True:
            _show(await look(env, within), as_json=as_json)
            sys.stdout.flush()
            await asyncio.sleep(every)
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            live.update(_table(await look(env, within)), refresh=True)
            await asyncio.sleep(every)


def _show(rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        click.echo(json_text({"up": not down(rows), "components": rows}, indent=not _piped()))
    elif _piped():
        for row in rows:
            click.echo("\t".join(plain(cell) for cell in _cells(row)))
    else:
        screen().print(_table(rows))


def _piped() -> bool:
    return not screen().is_terminal


def _table(rows: list[Row]) -> RenderableType:
    table = plain_table(*_COLUMNS, whole=_COLUMNS[:-1])
    for row in rows:
        name, state, *rest = _cells(row)
        add(table, name, Text(state, style={True: "green", False: "bold red", None: ""}[row.up]), *rest)
    return table


def _cells(row: Row) -> list[str]:
    state = {True: "up", False: "DOWN", None: "-"}[row.up]
    return [
        row.name,
        state,
        row.version,
        row.lag,
        row.disk,
        took(row.took) if row.took is not None else "-",
        row.detail,
    ]
