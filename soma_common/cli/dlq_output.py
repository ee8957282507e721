"""Dead letters on a terminal: tables for people, JSON for programs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from soma_common.cli.tables import add, escaped, plain_table, screen
from soma_common.cli.telling import warn
from soma_common.dlq.careful import Redrive
from soma_common.dlq.models import FullLetter, HistoryEntry, LetterPage, Summary
from soma_common.escaping import json_text

_SHOWN = 2000  # bytes of a value
_WIDE = 160  # columns of a terminal that has room for everything
_WHOLE = ("letter", "example", "fingerprint", "status", "count")  # what the next command wants is never folded
# Columns; those with a star are left out where there is no room for them.
_LETTER = ("letter", "status", "consumer", "*event type", "*record", "*tries", "*parked", "error")
_GROUP = ("count", "consumer", "status", "fingerprint", "*event type", "*oldest", "*newest", "*example", "error")


def letters(page: LetterPage, *, as_json: bool) -> None:
    """A page of letters."""
    if as_json:
        _json({"letters": [_plain(letter) for letter in page.letters], "next_cursor": page.next_cursor})
        return
    _print(screen(), _LETTER, [
        {"letter": letter.letter_id, "status": letter.status, "consumer": letter.consumer,
         "event type": letter.event.event_type or "-", "record": letter.origin, "tries": letter.attempts,
         "parked": f"{letter.parked_at:%m-%d %H:%M:%S}", "error": _error(letter.error_type, letter.message)}
        for letter in page.letters
    ])  # fmt: skip
    if page.next_cursor is not None:
        click.echo(f"more: --cursor {page.next_cursor}")


def letter(full: FullLetter, history: Sequence[HistoryEntry], *, as_json: bool) -> None:
    """One letter with everything that is kept of it."""
    if as_json:
        _json(_plain(full) | {"history": [_plain(entry) for entry in history]})
        return
    one, console = full.letter, screen()
    table = Table(box=None, show_header=False)
    facts = {
        "letter": one.letter_id, "status": f"{one.status}, {one.attempts} tries, revision {one.revision}",
        "consumer": one.consumer, "record": one.origin, "sequence": repr(one.sequence),
        "event": f"{one.event.event_id or '-'} {one.event.event_type or ''}", "tenant": one.event.tenant_id or "-",
        "trace": one.event.trace_id.hex if one.event.trace_id else "-", "parked": one.parked_at,
        "next try": f"{one.next_at or '-'} ({one.automatic_left} automatic left)",
        "error": _error(one.error_type, full.message), "fingerprint": one.fingerprint or "-",
        "key": repr(full.record.key), "value": _value(full.record.value),
    }  # fmt: skip
    if one.edited_at is not None:
        facts["edited"] = f"by {one.edited_by} at {one.edited_at}: {_value(full.edited_value)}"
    for name, value in facts.items():
        add(table, name, value)
    for name, header in full.record.headers:
        add(table, f"header {name}", repr(header))
    console.print(table)
    if full.stack:
        console.print(escaped(full.stack))
    told = plain_table("at", "who", "what", "why")
    for entry in history:
        add(told, f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.who, entry.what, entry.why or "")
    console.print(told)


def summary(groups: Sequence[Summary], *, as_json: bool) -> None:
    """Letters by consumer, status and fingerprint."""
    if as_json:
        _json([_plain(group) for group in groups])
        return
    _print(screen(), _GROUP, [
        {"count": group.count, "consumer": group.consumer, "status": group.status,
         "fingerprint": group.fingerprint or "-",
         "event type": group.event_type or "-", "oldest": f"{group.oldest:%m-%d %H:%M:%S}",
         "newest": f"{group.newest:%m-%d %H:%M:%S}", "example": group.example,
         "error": _error(group.error_type, group.message)}
        for group in groups
    ])  # fmt: skip


def redriven(state: Redrive, *, dry_run: bool, as_json: bool) -> None:
    """How many letters were, or would be, asked for, and how that went."""
    if as_json:
        known = {} if dry_run else {k: v for k, v in asdict(state).items() if k != "marked"}
        _json({"letters": state.marked, "dry_run": dry_run} | known)
        return
    click.echo(f"{state.marked} letters {'match' if dry_run else 'will be tried again'}")
    if state.resolved or state.failed:
        click.echo(f"so far: {state.resolved} resolved, {state.failed} failed, {state.waiting} under way")
    if state.stopped is not None:
        warn(f"stopped: {state.stopped}")
        for fingerprint in state.fingerprints:
            click.echo(f"  somastack dlq list --all-tenants --fingerprint {fingerprint}", err=True)
        click.echo(f"go on with: --after {state.cursor}; without it those that failed are tried first", err=True)


def _print(console: Console, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """A table of as many columns as fit."""
    shown = [name.lstrip("*") for name in columns if console.width >= _WIDE or not name.startswith("*")]
    table = plain_table(*shown, whole=_WHOLE)
    for row in rows:
        add(table, *(row[name] for name in shown))
    console.print(table)


def _error(kind: str | None, message: str | None) -> str:
    return f"{kind}: {(message or '').splitlines()[0][:120] if message else ''}" if kind else "-"


def _value(value: bytes | None) -> str:
    if value is None:
        return "(null)"
    shown = value[:_SHOWN].decode("utf-8", "replace")
    return shown if len(value) <= _SHOWN else f"{shown} ... ({len(value)} bytes)"


def _plain(value: Any) -> Any:
    return asdict(value)


def _json(value: Any) -> None:
    """Bytes as base64, ids and times as text."""
    click.echo(json_text(_jsonable(value), indent=True))


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value
