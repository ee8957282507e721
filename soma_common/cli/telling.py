"""How commands tell of errors: a line on stderr, its cure below it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from soma_common.errors import SomaError
from soma_common.escaping import json_text, plain

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


def reporting(refused: type[SomaError]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Commands that tell errors as lines on stderr: exit code 1 for those of this class, 2 for others."""

    def reports(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*args: Any, **options: Any) -> None:
            try:
                command(*args, **options)
            except SomaError as error:
                complain(error)
                sys.exit(1 if isinstance(error, refused) else 2)

        return run

    return reports


def told(text: str, done: bool, *, as_json: bool, **facts: Any) -> None:
    """What a verb did; the exit code is 1 when there was nothing to do."""
    click.echo(json_text({"done": done} | facts, indent=True) if as_json else plain(text))
    if not done:
        sys.exit(1)


def _shown(text: str) -> str:
    return plain(text, lines=True).replace("\n", _BREAK)
