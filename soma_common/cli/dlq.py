"""``somastack dlq``: dead letters, as an operator finds, mends, retries and discards them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from soma_common.cli import dlq_output as output
from soma_common.cli import dlq_progress as progress
from soma_common.cli.db import dsn_of
from soma_common.cli.show import login
from soma_common.cli.telling import reporting, told
from soma_common.cli.tenants import whose
from soma_common.config import SomaConfig
from soma_common.dlq.careful import Redrive, RedriveRules
from soma_common.dlq.filters import LetterFilter
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import OPEN, Letter, Status
from soma_common.errors import DeadLetterError, ValidationError
from soma_common.wiring import make_pool


@click.group()
def dlq() -> None:
    """Dead letters: list, show, retry, retry-all, edit, discard, summary.

    Exit codes: 0 done, 1 refused or nothing to do (no such letter, settled already), 2 it could not be tried,
    3 a re-drive stopped by itself.
    """


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which letters."""
    options = [
        click.option("--tenant", help="Letters of this tenant."),
        click.option("--all-tenants", is_flag=True, help="Of every tenant, and those that could not be decoded."),
        click.option("--consumer", help="Of this consumer."),
        click.option(
            "--status", multiple=True, type=click.Choice([status.value for status in Status]), help="May be repeated."
        ),
        click.option("--fingerprint", help="Failures of one kind, as `summary` shows them."),
        click.option("--type", "event_type", help="Of this event type."),
        click.option("--event", "event_id", help="Of this event id."),
        click.option("--trace", "trace_id", help="Of this trace id."),
        click.option("--json", "as_json", is_flag=True, help="JSON instead of a table."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a line.")
_WHO = click.option("--who", default=login, help="Name in the history.  [default: your login]")
_reports = reporting(DeadLetterError)


@dlq.command(name="list")
@_filters
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000))
@click.option("--cursor", help="The next page, as the page before named it.")
@click.option("--newest", is_flag=True, help="Newest first.")
@_reports
def list_letters(limit: int, cursor: str | None, newest: bool, as_json: bool, **given: Any) -> None:
    """Letters in the order in which they were parked."""
    wanted = _filter(given)
    page = _run("", lambda handler: handler.list_dlq_events(wanted, cursor, limit=limit, newest_first=newest))
    output.letters(page, as_json=as_json)


@dlq.command()
@click.argument("letter_id")
@click.option("--json", "as_json", is_flag=True, help="JSON, with bytes as base64.")
@_reports
def show(letter_id: str, as_json: bool) -> None:
    """One letter: its record, its error, what was done with it."""

    async def work(handler: DLQHandler) -> Any:
        return await handler.show(letter_id), await handler.history(letter_id)

    letter, history = _run("", work)
    output.letter(letter, history, as_json=as_json)


@dlq.command()
@click.argument("letter_id")
@click.option("--why", help="A reason for the history.")
@click.option("--dry-run", is_flag=True, help="Show what stands there; change nothing.")
@_JSON
@_WHO
@_reports
def retry(letter_id: str, why: str | None, dry_run: bool, as_json: bool, who: str) -> None:
    """Ask for another try of a letter and its whole sequence. The running consumer does it, in order."""
    if dry_run:

        async def work(handler: DLQHandler) -> tuple[Letter, bool]:
            return (await handler.show(letter_id)).letter, await handler.retry_event(letter_id, dry_run=True)

        letter, can = _run(who, work)
        text = f"{letter.letter_id} is {letter.status}: {'would be tried' if can else 'nothing would be done'}"
        told(text, can, as_json=as_json, letter_id=letter.letter_id, dry_run=True, status=letter.status)
        return
    done = _run(who, lambda handler: handler.retry_event(letter_id, why=why))
    nothing = "nothing to do: it was asked for before, or the letter is settled"
    text = "another try is asked for" if done else nothing
    told(text, done, as_json=as_json, letter_id=letter_id, dry_run=False)


@dlq.command(name="retry-all")
@_filters
@click.option("--max", "most", type=click.IntRange(min=1), help="At most so many letters, the oldest first.")
@click.option("--rate", type=click.FloatRange(0, 1e6, min_open=True), help="Most letters per second.")
@click.option("--ahead", default=200, show_default=True, type=click.IntRange(1, 100_000),
              help="Most letters asked for and not done.")  # fmt: skip
@click.option(
    "--window", default=50, show_default=True, type=click.IntRange(1, 100_000), help="Look at the last so many."
)
@click.option("--failures", default=0.5, show_default=True, type=click.FloatRange(0, 2, min_open=True),
              help="Stop when this share of them failed again; above 1: never.")  # fmt: skip
@click.option("--patience", default=60.0, show_default=True, type=click.FloatRange(0, 86_400, min_open=True),
              help="Stop when none ends for so many seconds.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Until the last one is done, not only asked for.")
@click.option("--after", help="Go on past what an earlier call asked for, as it said.")
@click.option("--why", help="A reason for the history.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@_WHO
@_reports
def retry_all(
    most: int | None, rate: float | None, ahead: int, window: int, failures: float, patience: float, wait: bool,
    after: str | None, why: str | None, dry_run: bool, who: str, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Ask for another try of all dead and retrying letters that match, and see what becomes of them.

    Stops by itself when too many fail again. It may be broken off and called again.
    """
    wanted = _filter(given)
    rules = RedriveRules(rate=rate, window=window, failures=failures, ahead=ahead, patience=patience, wait=wait)

    async def work(handler: DLQHandler) -> Redrive:
        total = await handler.retry_many(wanted, dry_run=True, most=most, after=after)
        if dry_run:
            return Redrive(marked=total)
        steps = handler.redrive(wanted, rules=rules, most=most, why=why, after=after)
        return await progress.followed(steps, total, quiet=as_json)

    state = _run(who, work)
    output.redriven(state, dry_run=dry_run, as_json=as_json)
    if state.stopped is not None:
        sys.exit(3)


@dlq.command()
@click.argument("letter_id")
@click.option("--value", help="The new value.")
@click.option("--file", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read it from here.")
@click.option("--raw", is_flag=True, help="Take bytes that are no JSON in place of JSON.")
@click.option("--why", help="A reason for the history.")
@click.option("--dry-run", is_flag=True, help="Check letter and value; change nothing.")
@_JSON
@_WHO
@_reports
def edit(letter_id: str, value: str | None, path: Path | None, raw: bool, why: str | None, dry_run: bool,
         as_json: bool, who: str) -> None:  # fmt: skip
    """Give a letter another value for its next try. The original stays; your name stands beside the edit."""
    if (value is None) == (path is None):
        raise ValidationError("One new value is wanted.", cure="give --value or --file.")
    written = path.read_bytes() if path is not None else (value or "").encode("utf-8", "surrogateescape")

    async def work(handler: DLQHandler) -> int:
        letter = await handler.show(letter_id)
        return await handler.edit(letter, written, why=why, raw=raw, dry_run=dry_run)

    revision = _run(who, work)
    text = f"would be edited: {len(written)} bytes" if dry_run else f"edited: revision {revision}"
    facts = {"size": len(written)} if dry_run else {"revision": revision}
    told(text, True, as_json=as_json, letter_id=letter_id, dry_run=dry_run, **facts)


@dlq.command()
@click.argument("letter_id")
@click.option("--reason", required=True, help="Why it is given up, for the history.")
@click.option("--dry-run", is_flag=True, help="Show what stands there; change nothing.")
@_JSON
@_WHO
@_reports
def discard(letter_id: str, reason: str, dry_run: bool, as_json: bool, who: str) -> None:
    """Give a letter up. What stands behind it in its sequence goes on."""
    if dry_run:
        letter = _run(who, lambda handler: handler.show(letter_id)).letter
        can, error = letter.status in OPEN, letter.error_type or "it waits behind another"
        will = "would be discarded" if can else "nothing would be done"
        text = f"{letter.letter_id} is {letter.status} ({error}): {will}"
        told(text, can, as_json=as_json, letter_id=letter.letter_id, dry_run=True, status=letter.status)
        return
    done = _run(who, lambda handler: handler.discard(letter_id, reason))
    text = "discarded" if done else "nothing to do: it was discarded before"
    told(text, done, as_json=as_json, letter_id=letter_id, dry_run=False)


@dlq.command()
@_filters
@_reports
def summary(as_json: bool, **given: Any) -> None:
    """Letters counted by consumer, status and kind of failure, each with an example."""
    wanted = _filter(given)
    output.summary(_run("", lambda handler: handler.summary(wanted)), as_json=as_json)


def _filter(given: dict[str, Any]) -> LetterFilter:
    tenant = whose("letters", given.pop("tenant"), given.pop("all_tenants"))
    return LetterFilter(tenant_id=tenant, statuses=given.pop("status") or None, **given)


def _run(who: str, work: Callable[[DLQHandler], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with make_pool(config, dsn) as pool:
            return await work(DLQHandler(pool, who=who))

    config = SomaConfig.from_env()
    with dsn_of(config) as dsn:
        return asyncio.run(run())
