"""Sagas on a terminal: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from soma_common.cli.tables import add, escaped, plain_table, screen
from soma_common.escaping import json_text
from soma_common.moments import span, stamp, took
from soma_common.sagas.journal import What
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.timeline import Line, Sign, Timeline, error_of, help_of, short, stuck_at, value_of, where
from soma_common.sagas.views import LoggedEntry, SagaPage, SagaView

# Columns, with the width of the terminal from which on there is room for them.
_COLUMNS: Final = {
    "saga": 0, "name": 0, "status": 0, "where": 0, "age": 100, "error": 120, "tenant": 160, "correlation": 200,
}  # fmt: skip
_CHANGING: Final = ("saga", "name", "status", "asked", "deadline")
_WHOLE: Final = ("saga", "status")  # what the next command wants is never folded
_STATUS: Final = {
    SagaStatus.PENDING: "dim", SagaStatus.RUNNING: "cyan", SagaStatus.COMPENSATING: "yellow",
    SagaStatus.COMPLETED: "green", SagaStatus.COMPENSATED: "magenta", SagaStatus.STUCK: "bold red",
}  # fmt: skip
# A sign, what stands for it where there is only ASCII, and its colour.
_SIGNS: Final = {
    Sign.DONE: ("✓", "+", "green"), Sign.SKIPPED: ("↷", ">", "yellow"), Sign.FAILED: ("✗", "x", "red"),
    Sign.RETRYING: ("↻", "~", "yellow"), Sign.UNKNOWN: ("?", "?", "red"), Sign.WAITING: ("…", ".", "cyan"),
    Sign.UNDONE: ("↶", "<", "magenta"), Sign.TURNED: ("↩", "<", "yellow"), Sign.STUCK: ("■", "#", "bold red"),
    Sign.ENDED: ("●", "*", "bold"), Sign.PERSON: ("☞", "@", "bold blue"),
}  # fmt: skip
_DAY: Final = timedelta(days=1)  # a journal that is longer tells dates


def sagas(page: SagaPage, *, as_json: bool) -> None:
    """A page of sagas."""
    if as_json:
        document({"sagas": [asdict(saga) for saga in page.sagas], "next_cursor": page.next_cursor})
        return
    now, console = datetime.now(UTC), screen()
    columns = [name for name, width in _COLUMNS.items() if console.width >= width]
    table = plain_table(*columns, whole=_WHOLE)
    for saga in page.sagas:
        cells: dict[str, Any] = {
            "saga": saga.saga_id, "name": f"{short(saga.name)} v{saga.version}", "status": status(saga.status),
            "where": short(where(saga, now)), "age": span(now - saga.created_at),
            "error": error_of(saga.error_type, saga.error), "tenant": short(saga.tenant_id),
            "correlation": short(saga.correlation_id),
        }  # fmt: skip
        add(table, *(cells[name] for name in columns))
    console.print(table)
    if page.next_cursor is not None:
        click.echo(f"more: --cursor {page.next_cursor}")


def saga(view: SagaView, *, as_json: bool) -> None:
    """One saga with everything that is kept of it."""
    if as_json:
        document(asdict(view))
    else:
        screen().print(pictured(view), crop=False)


def document(value: Any) -> None:
    """One JSON document: ids and times as text."""
    click.echo(json_text(value, indent=True))


def pictured(view: SagaView, *, lines: int | None = None) -> RenderableType:
    """A saga as it is now: what it is, what happened, what can be done. With ``lines``: what changes, and so many lines
    of what happened last.
    """
    now = datetime.now(UTC)
    facts = _facts(view, now)
    header = facts if lines is None else {name: facts[name] for name in _CHANGING}
    parts: list[RenderableType] = [_header(header), Text(), _timeline(view, lines)]
    if view.status is SagaStatus.STUCK:
        parts += [Text(), _help(view)]
    elif view.ended_at is None:
        parts += [Text(), escaped(f"now: {where(view, now)}", "cyan")]
    return Group(*parts)


def status(of: SagaStatus) -> Text:
    """A status in its colour."""
    return Text(of.value, style=_STATUS[of])


def _header(facts: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        if value != "":
            add(table, Text(name, style="dim"), value)
    return table


def _facts(view: SagaView, now: datetime) -> dict[str, Any]:
    return {
        "saga": view.saga_id, "name": f"{short(view.name)} v{view.version}", "status": _standing(view),
        "asked": _asked(view.journal), "tenant": short(view.tenant_id), "key": short(view.saga_key),
        "correlation": short(view.correlation_id, 600), "trace": view.trace_id,
        "started": f"{stamp(view.created_at)} ({span(now - view.created_at)} ago)", "ended": _ended(view),
        "deadline": "" if view.ended_at else _deadline(view, now), "priority": view.priority,
        "input": value_of(view.input), "result": value_of(view.result),
    }  # fmt: skip


def _standing(view: SagaView) -> Text:
    error = error_of(view.error_type, view.error)
    because = f" because of {short(view.reason)}" if view.reason else ""
    return Text().append_text(status(view.status)).append_text(escaped(because + (f": {error}" if error else "")))


def _asked(journal: Iterable[LoggedEntry]) -> str:
    asked = [entry for entry in journal if entry.what in (What.COMPENSATE, What.CANCEL)]
    if not asked:
        return ""
    last = asked[-1]
    return f"to {last.what}, by {short(last.who)} at {stamp(last.at)}: {short(last.why)}"


def _ended(view: SagaView) -> str:
    return f"{stamp(view.ended_at)} (after {took_of(view)})" if view.ended_at else ""


def took_of(view: SagaView) -> str:
    """How long a saga took that ended."""
    return took(((view.ended_at or datetime.now(UTC)) - view.created_at).total_seconds())


def _deadline(view: SagaView, now: datetime) -> str:
    left = view.deadline - now
    told = f"in {span(left)}" if left > timedelta() else "passed"
    return f"{stamp(view.deadline)} ({told})"


def _timeline(view: SagaView, most: int | None) -> Table:
    found = Timeline(view.journal).lines
    long = bool(found) and found[-1].at - found[0].at > _DAY
    rows = [cells for line in found for cells in _rows(line, days=long)]
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name in ("", "at", "step", "try", "took"):
        table.add_column(name, no_wrap=True, overflow="fold" if most is None else "ellipsis")
    table.add_column("detail", overflow="fold" if most is None else "ellipsis", no_wrap=most is not None)
    table.columns[2].no_wrap = most is not None
    for cells in rows if most is None else rows[max(0, len(rows) - most) :]:
        table.add_row(*cells)
    return table


def _rows(line: Line, *, days: bool) -> list[list[Text]]:
    """A line of the timeline, and its folded tries."""
    at = line.at.astimezone(UTC)
    when = f"{at:%m-%d %H:%M:%S}" if days else f"{at:%H:%M:%S.%f}"[:-3]
    tries = f"try {line.attempt}" if line.attempt > 1 else ""
    colour = _SIGNS[line.sign][2]
    own = line.sign in (Sign.TURNED, Sign.STUCK, Sign.ENDED, Sign.PERSON, Sign.FAILED)
    first = [
        sign(line.sign), Text(when, style="dim"), escaped(short(line.step)), Text(tries),
        Text("" if line.took is None else took(line.took), style="dim"), escaped(line.detail, colour if own else ""),
    ]  # fmt: skip
    return [first, *([Text()] * 5 + [escaped(each, "dim")] for each in line.folded)]


def sign(of: Sign) -> Text:
    """The sign of a line; where the stream takes only ASCII, another one."""
    pretty, ascii_only, colour = _SIGNS[of]
    return Text(pretty if _takes_signs() else ascii_only, style=colour)


def _takes_signs() -> bool:
    try:
        "✓↻☞".encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def _help(view: SagaView) -> Group:
    """What a person can do, ready to copy."""
    step = stuck_at(view, view.journal)
    lines = [escaped(f"It is stuck{f' at {short(step)}' if step else ', but at no step'}. What can help:", "bold red")]
    for command, does in help_of(view, view.journal):
        whole = escaped(f"  {command}")
        whole.no_wrap, whole.overflow = True, "ignore"  # to be copied
        lines += [escaped(f"  # {does}", "dim"), whole]
    return Group(*lines)


def entry_line(view: SagaView, entry: LoggedEntry) -> str:
    """An entry of a journal as a line of its own."""
    line = Timeline([entry]).lines[0]
    detail = line.tries[0] if line.tries else line.detail
    if entry.what is What.ENDED:
        detail = f"{view.status} after {took_of(view)}"
    lasted = "" if line.took is None else took(line.took)
    cells: Sequence[str] = (
        f"{entry.at.astimezone(UTC):%H:%M:%S.%f}"[:-3] + "Z",
        sign(line.sign).plain,
        short(line.step),
    )
    return "  ".join(cell for cell in (*cells, lasted, detail) if cell)


def title(console: Console, view: SagaView) -> None:
    """A line that says which saga."""
    console.print(escaped(f"{short(view.name)} v{view.version} {view.saga_id}: {view.status}"))
