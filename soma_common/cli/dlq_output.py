"""Dead letters on a terminal: tables for people, JSON for programs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soma_common.dlq.careful import Redrive
from soma_common.dlq.models import FullLetter, HistoryEntry, Letter, LetterPage, Summary

_SHOWN = 2000  # bytes of a value


def letters(page: LetterPage, *, as_json: bool) -> None:
    """A page of letters."""
    if as_json:
        _json({"letters": [_plain(letter) for letter in page.letters], "next_cursor": page.next_cursor})
        return
    table = _table("letter", "status", "consumer", "event type", "record", "tries", "parked", "error")
    for letter in page.letters:
        _row(table, letter.letter_id, letter.status, letter.consumer, letter.event.event_type or "-", _place(letter),
             letter.attempts, f"{letter.parked_at:%m-%d %H:%M:%S}",
             _error(letter.error_type, letter.message))  # fmt: skip
    _console().print(table)
    if page.next_cursor is not None:
        click.echo(f"more: --cursor {page.next_cursor}")


def letter(full: FullLetter, history: Sequence[HistoryEntry], *, as_json: bool) -> None:
    """One letter with everything that is kept of it."""
    if as_json:
        _json(_plain(full) | {"history": [_plain(entry) for entry in history]})
        return
    one, console = full.letter, _console()
    table = Table(box=None, show_header=False)
    facts = {
        "letter": one.letter_id, "status": f"{one.status}, {one.attempts} tries, revision {one.revision}",
        "consumer": one.consumer, "record": _place(one), "sequence": repr(one.sequence),
        "event": f"{one.event.event_id or '-'} {one.event.event_type or ''}", "tenant": one.event.tenant_id or "-",
        "trace": one.event.trace_id.hex if one.event.trace_id else "-", "parked": one.parked_at,
        "next try": f"{one.next_at or '-'} ({one.automatic_left} automatic left)",
        "error": _error(one.error_type, full.message), "fingerprint": one.fingerprint or "-",
        "key": repr(full.record.key), "value": _value(full.record.value),
    }  # fmt: skip
    if one.edited_at is not None:
        facts["edited"] = f"by {one.edited_by} at {one.edited_at}: {_value(full.edited_value)}"
    for name, value in facts.items():
        _row(table, name, value)
    for name, header in full.record.headers:
        _row(table, f"header {name}", repr(header))
    console.print(table)
    if full.stack:
        console.print(_text(full.stack))
    told = _table("at", "who", "what", "why")
    for entry in history:
        _row(told, f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.who, entry.what, entry.why or "")
    console.print(told)


def summary(groups: Sequence[Summary], *, as_json: bool) -> None:
    """Letters by consumer, status and fingerprint."""
    if as_json:
        _json([_plain(group) for group in groups])
        return
    table = _table("count", "consumer", "status", "fingerprint", "event type", "oldest", "newest", "example", "error")
    for group in groups:
        _row(table, group.count, group.consumer, group.status, group.fingerprint or "-", group.event_type or "-",
             f"{group.oldest:%m-%d %H:%M:%S}", f"{group.newest:%m-%d %H:%M:%S}", group.example,
             _error(group.error_type, group.message))  # fmt: skip
    _console().print(table)


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
        click.secho(f"stopped: {state.stopped}", fg="red", err=True)
        for fingerprint in state.fingerprints:
            click.echo(f"  somastack dlq list --all-tenants --fingerprint {fingerprint}", err=True)
        click.echo(f"go on with: --after {state.cursor}; without it those that failed are tried first", err=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *values: Any) -> None:
    table.add_row(*(_text(str(value)) for value in values))


def _text(text: str) -> Text:
    """As it is: no markup, and no control characters that would steer the terminal."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


def _console() -> Console:
    console = Console(soft_wrap=False)
    # A pipe has no width: nothing is folded for it.
    return console if console.is_terminal else Console(width=400)


def _place(one: Letter) -> str:
    if one.partition < 0:  # it never got as far as a partition
        return f"{one.topic}, outbox row {one.offset}"
    return f"{one.topic}[{one.partition}]@{one.offset}"


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
    click.echo(orjson.dumps(_jsonable(value), option=orjson.OPT_INDENT_2).decode())


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
