"""How commands tell of errors: a line on stderr, its cure below it."""

from __future__ import annotations

import os

import click

from soma_common.cli.escaping import plain
from soma_common.errors import SomaError

_BREAK = "\n" + " " * 7  # further lines of an error stand below its text, and cannot pass for a cure


def warn(text: str) -> None:
    """A line on stderr: red on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    shown = _shown(text)
    click.echo(shown if os.environ.get("NO_COLOR") else click.style(shown, fg="red"), err=True)


def complain(error: SomaError) -> None:
    """An error and its cure. Either may quote what others wrote."""
    warn(f"Error: {error.message}")
    if error.cure:
        click.echo(f"Cure:  {_shown(error.cure)}", err=True)


def _shown(text: str) -> str:
    return plain(text, lines=True).replace("\n", _BREAK)
