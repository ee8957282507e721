"""Tables of commands: of as many columns as a terminal has room for, whole in a pipe."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from soma_common.escaping import plain

_PIPE = 400  # a pipe has no width: nothing is folded for it


def screen() -> Console:
    """Where commands write."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=_PIPE)


def plain_table(*columns: str, whole: Collection[str] = ()) -> Table:
    """A table without lines. The columns that are ``whole`` are never folded."""
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    return table


def add(table: Table, *values: Any) -> None:
    """A row of what others wrote; what is a ``Text`` already stays as it is."""
    table.add_row(*(value if isinstance(value, Text) else escaped(str(value)) for value in values))


def escaped(text: str, style: str = "") -> Text:
    """As it is: no markup, and nothing that would steer the terminal."""
    return Text(plain(text, lines=True), style=style)
