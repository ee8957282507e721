"""How findings look: one line each, its cure below it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import click

from soma_common.cli.checks.findings import Area, Finding, Level
from soma_common.escaping import json_text, plain

_LOOKS: Final = {
    Level.OK: ("✓", "ok", "green"), Level.WARN: ("!", "warn", "yellow"), Level.FAIL: ("✗", "FAIL", "red"),
    Level.SKIPPED: ("-", "skip", "bright_black"),
}  # fmt: skip
_WIDTH: Final = 31


def show(found: Mapping[Area, Sequence[Finding]], *, quiet: bool) -> None:
    """As lines; with ``quiet`` only what is to be looked at."""
    for area, findings in found.items():
        for finding in findings:
            if not quiet or finding.level in (Level.WARN, Level.FAIL):
                _line(area, finding)
    counts = {level: sum(finding.level is level for each in found.values() for finding in each) for level in Level}
    click.echo(f"{counts[Level.FAIL]} failed, {counts[Level.WARN]} to look at, {counts[Level.OK]} fine")


def show_json(found: Mapping[Area, Sequence[Finding]], code: int) -> None:
    """As one JSON object."""
    findings = [
        {"area": area, "check": each.check, "level": each.level, "text": each.text, "cure": each.cure}
        for area, several in found.items()
        for each in several
    ]
    click.echo(json_text({"exit_code": code, "findings": findings}, indent=True))


def _line(area: Area, finding: Finding) -> None:
    word, name = plain(finding.text), f"{area}: {finding.check}"
    click.echo(f"{_sign(finding.level)} {name:<{_WIDTH}} {word}")
    if finding.cure:
        click.echo(f"     {'':<{_WIDTH}} {plain(finding.cure)}")


def _sign(level: Level) -> str:
    """On a terminal a sign in colour, else a word: both of four columns."""
    sign, word, colour = _LOOKS[level]
    if os.environ.get("NO_COLOR") or not _terminal():
        return f"{word:<4}"
    return click.style(f" {sign}  ", fg=colour)


def _terminal() -> bool:
    """Whether stdout is one, and can show the signs."""
    try:
        "".join(sign for sign, *_ in _LOOKS.values()).encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return sys.stdout.isatty()
