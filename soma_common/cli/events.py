"""``somastack events``: the recorded events of the application's database, and replays of them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import click

from soma_common.cli.interrupting import interruptible
from soma_common.cli.replaying import (
    archive_of,
    audit_options,
    conditions_of,
    engine_of,
    filters,
    open_store,
    order_options,
    projection_of,
    replay_options,
    scanned,
)
from soma_common.cli.show import as_json, as_line, show_events, show_plan, show_runs, show_state, watch
from soma_common.cli.tenants import whose
from soma_common.errors import ValidationError
from soma_common.events.store import EventFilter, EventStore, Page
from soma_common.postgres.cursor import Cursor
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import ReplayFilter, ReplayMode, ReplayState
from soma_common.retention.places import open_storage
from soma_common.retention.reader import ArchiveReader

_AT_ONCE = 50  # events held at once


@click.group()
def events() -> None:
    """Recorded events: list, show, tail, replay, replays. What reads events names its tenant, or --all-tenants."""


_archive = click.option(
    "--archive", "place", metavar="PLACE", help="From the archives in a folder or s3://bucket/path, not from the log."
)


@events.command("list")
@filters
@click.option("--correlation-id", "--correlation", "correlation_id", metavar="ID")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--after", type=click.IntRange(0), help="Go on after this position.")
@click.option("--newest-first", is_flag=True)
@_archive
def list_events(
    limit: int, after: int | None, newest_first: bool, place: str | None, json: bool, **given: Any
) -> None:  # fmt: skip
    """A page of events by position."""
    wanted = EventFilter(**conditions_of(given))

    async def query() -> None:
        async with _events_of(place) as source:
            pages = _pages(source, wanted, limit, after=after, newest_first=newest_first)
            more = await show_events(pages, json=json)
        if more is not None and not json:
            click.echo(f"more: --after {more}", err=True)

    asyncio.run(query())


@events.command()
@click.argument("event_id")
@click.option("--tenant", "tenant_id", metavar="NAME")
@click.option("--all-tenants", is_flag=True, help="Whichever tenant's it is.")
@_archive
def show(event_id: str, tenant_id: str | None, all_tenants: bool, place: str | None) -> None:
    """One event, whole, as indented JSON. Exit code 1 when there is none."""
    wanted = EventFilter(event_id=event_id, tenant_id=whose("events", tenant_id, all_tenants))

    async def query() -> None:
        async with _events_of(place) as source:
            found = await source.query(wanted, limit=1)
        if not found:
            raise ValidationError(f"There is no event {event_id:.80}.", cure="check its id and its tenant.")
        click.echo(as_json(found[0], indent=True))

    asyncio.run(query())


@events.command()
@filters
@click.option("-n", "--lines", default=10, show_default=True, type=click.IntRange(0, 10_000))
@click.option("-f", "--follow", is_flag=True, help="Go on with what is recorded from now on, until Ctrl-C.")
def tail(lines: int, follow: bool, json: bool, **given: Any) -> None:
    """The newest events, the oldest of them first."""
    conditions = conditions_of(given)
    wanted, live = EventFilter(**conditions), ReplayFilter(**conditions)

    async def read() -> None:
        async with open_store() as store:
            latest = await store.ticks.latest()
            newest = [  # their lines, not they themselves: those may be large
                (event.position, as_json(event) if json else as_line(event))
                async for page in _pages(store, wanted, lines, newest_first=True)
                for event in page
            ]
            for _, line in reversed(newest):
                click.echo(line)
            told = {position for position, _ in newest}
            if not follow:
                return
            async for event, _ in store.subscribe(after=Cursor(latest.tick_id, latest.token)):
                if event.position not in told and live.matches(event):
                    click.echo(as_json(event) if json else as_line(event))
                    sys.stdout.flush()

    interruptible(read)


@events.command()
@filters
@click.option("--consumer", default="default", show_default=True, metavar="NAME")
@click.option("--app", metavar="MODULE:NAME", help="The Soma whose handlers apply the events; not for --dry-run.")
@replay_options
@order_options
@click.option("--no-swap", is_flag=True, help="End a rebuild when it has caught up; --resume swaps.")
@audit_options
@click.option("--dry-run", is_flag=True, help="Print what it would read.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was paused, failed, or interrupted.")
@click.option("--pause", metavar="RUN", help="Stop a run; it can be resumed.")
@click.option("--cancel", metavar="RUN", help="End a run for good.")
@click.option("--archive", "place", metavar="PLACE", help="Where events are that were removed from the log.")
def replay(consumer: str, app: str | None, dry_run: bool, place: str | None, **given: Any) -> None:
    """Replay events of the log, or of Kafka, to a consumer.

    Each has its effect once: what the consumer's inbox knows is passed over, except with --mode force. With --mode
    rebuild its tables are made anew from all events beside the live ones, and then swapped.
    """
    json, mode = given.pop("json"), ReplayMode(given.pop("mode"))
    acts = {name: given.pop(name) for name in ("resume", "pause", "cancel")}
    order = {name: given.pop(name) for name in ("rate", "requested_by", "reason", "source")}
    order["projection"] = projection_of(mode, *(given.pop(name) for name in ("tables", "schema", "create")))
    swap = not given.pop("no_swap")
    if sum(act is not None for act in acts.values()) + dry_run > 1:
        raise click.UsageError("--dry-run, --resume, --pause and --cancel exclude each other.")
    # A run has its tenant: who takes one up, stops or ends it does not name it again.
    conditions = conditions_of(given) if not any(acts.values()) else {}

    async def work() -> None:
        applies = not dry_run and acts["pause"] is None and acts["cancel"] is None
        async with engine_of(consumer, app, archive_of(place), applies=applies) as engine:
            if dry_run:
                plan = engine.plan(ReplayFilter(**conditions), mode, source=order["source"], told=scanned)
                show_plan(await plan, json=json)
            elif not applies:
                run = await (engine.pause(acts["pause"]) if acts["pause"] else engine.cancel(acts["cancel"]))
                show_state(run, json=json)
            else:
                run_id = acts["resume"]
                if run_id is None:
                    run = await engine.start(ReplayFilter(**conditions), mode, **order)
                elif (run := await engine.progress(run_id)).state in (ReplayState.PAUSED, ReplayState.FAILED):
                    run = await engine.resume(run_id)
                click.echo(f"replay {run.run_id} of {consumer}", err=True)
                await watch(engine.run(run.run_id, swap=swap), last=run, json=json)

    interruptible(work)


@events.command()
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "json", is_flag=True, help="One JSON object per line.")
def replays(limit: int, json: bool) -> None:
    """The replays of every consumer, the newest first."""

    async def query() -> None:
        async with open_store() as store:
            show_runs(await Checkpoints(store.pool).newest(limit), json=json)

    asyncio.run(query())


async def _pages(
    source: EventStore | ArchiveReader, wanted: EventFilter, most: int, *, after: int | None = None,
    newest_first: bool = False,
) -> AsyncIterator[Page]:  # fmt: skip
    """Events in pages of few: each may have nearly a megabyte."""
    while most > 0:
        page = await source.query(wanted, limit=min(most, _AT_ONCE), after=after, newest_first=newest_first)
        yield page
        most, after = most - len(page), page.next_after
        if after is None:
            return


@asynccontextmanager
async def _events_of(place: str | None) -> AsyncIterator[EventStore | ArchiveReader]:
    """The log, or the archives of a place."""
    if place is not None:
        yield ArchiveReader(open_storage(place, os.environ))
        return
    async with open_store() as store:
        yield store
