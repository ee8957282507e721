"""How commands tell of errors: a line on stderr, its cure below it."""

from __future__ import annotations

import os

import click

from soma_common.errors import SomaError


def warn(text: str) -> None:
    """A line on stderr: red on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    click.echo(text if os.environ.get("NO_COLOR") else click.style(text, fg="red"), err=True)


def complain(error: SomaError) -> None:
    """An error and its cure."""
    warn(f"Error: {error.message}")
    if error.cure:
        click.echo(f"Cure:  {error.cure}", err=True)
