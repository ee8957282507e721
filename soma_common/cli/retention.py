"""``somastack retention``: what a policy asks for, carried out; and the archives that came of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from soma_common.cli.db import dsn_of
from soma_common.cli.log_options import Log, log_options
from soma_common.cli.show import login, show_table
from soma_common.config import SomaConfig
from soma_common.errors import RetentionError
from soma_common.escaping import json_text, plain
from soma_common.postgres.pool import Pool
from soma_common.retention.catalog import Archive, ArchiveState, Catalog, Force
from soma_common.retention.exporting import Exporter
from soma_common.retention.places import open_storage
from soma_common.retention.planning import RetentionPlan
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.running import Report, Retention, RetentionRun, RetentionSettings
from soma_common.retention.storage import Storage
from soma_common.service import run_until_signalled
from soma_common.wiring import make_pool


@click.group()
def retention() -> None:
    """Retention: plan, run, accept, archives. The database is the one that SOMASTACK_POSTGRES_DSN names."""


_POLICY = click.option(
    "--policy", required=True, metavar="FILE", type=click.Path(path_type=Path), help="What is kept for how long (TOML)."
)
_PLACE = click.option("--archive", "place", metavar="PLACE", help="A folder or s3://bucket/path; else the policy's.")
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
_WHO = click.option("--who", default=login, help="Name in the audit.  [default: your login]")


@retention.command()
@_POLICY
@_PLACE
@_JSON
def plan(policy: Path, place: str | None, as_json: bool) -> None:
    """What a run would do now. Nothing is changed."""
    _plan(*_given(policy, place), as_json=as_json)


def _plan(policy: RetentionPolicy, storage: Storage | None, *, as_json: bool) -> None:
    _show_plan(_with_pool(lambda pool: RetentionRun(pool, policy, storage, who="plan").plan()), as_json=as_json)


@retention.command()
@_POLICY
@_PLACE
@click.option("--dry-run", is_flag=True, help="The same as plan.")
@click.option("--force", is_flag=True, help="Remove what readers have not passed; they fail when they read on.")
@click.option("--why", default="", help="Why; --force asks for it.")
@click.option("--every", type=click.FloatRange(0.1), metavar="MINUTES", help="Stay, and run so often until SIGTERM.")
@_WHO
@_JSON
@log_options
def run(
    policy: Path, place: str | None, dry_run: bool, force: bool, why: str, every: float | None, who: str, as_json: bool,
    log: Log,
) -> None:  # fmt: skip
    """Archive and remove what is past its time. Safe beside everything else, and to kill at any moment."""
    given = _given(policy, place)
    if dry_run:
        _plan(*given, as_json=as_json)
        return
    if every is not None:
        if force:
            raise click.UsageError("--force is for one run: it excludes --every.")
        log.start()
        settings = RetentionSettings(every=every * 60)
        _with_pool(lambda pool: run_until_signalled(Retention(pool, *given, who=who, settings=settings)))
        return
    forced = Force(who, why) if force else None
    _show_report(_with_pool(lambda pool: RetentionRun(pool, *given, who=who, force=forced).run()), as_json=as_json)


@retention.command()
@click.argument("reader")
@click.option("--why", required=True, help="A reason for the audit.")
@_WHO
def accept(reader: str, why: str, who: str) -> None:
    """Let a READER (consumer:NAME) that stands before removed events go on with what is left of the log."""
    tick = _with_pool(lambda pool: Catalog(pool, who=who).accept(reader, by=who, why=why))
    click.echo(f"{plain(reader)} may go on without what was removed up to tick {tick}")


@retention.group()
def archives() -> None:
    """Archives: list, verify. Their events are read by `somastack events list --archive PLACE`."""


@archives.command(name="list")
@_JSON
def list_archives(as_json: bool) -> None:
    """Every archive that the database knows, by position."""
    found = _with_pool(lambda pool: Catalog(pool, who="list").archives())
    if as_json:
        _json([asdict(archive) for archive in found])
        return
    rows = [[a.state, f"{a.lower_position}-{a.upper_position - 1}", a.events, a.size, ", ".join(a.event_types),
             f"{a.started_at:%Y-%m-%d %H:%M}", a.made_by, _forced(a), a.location] for a in found]  # fmt: skip
    show_table(["state", "positions", "events", "bytes", "types", "when", "who", "forced", "place"], rows)


@archives.command()
@click.option("--archive", "place", required=True, metavar="PLACE", help="A folder or s3://bucket/path.")
@_JSON
def verify(place: str, as_json: bool) -> None:
    """Read every archive back, and compare it with its manifest and the database. Exit code 1 when one is not whole."""

    async def work(pool: Pool) -> list[dict[str, Any]]:
        catalog = Catalog(pool, who="verify")
        exporter = Exporter(catalog, open_storage(place, os.environ), _nothing)
        known = [a for a in await catalog.archives() if a.state is not ArchiveState.EXPORTING]
        return [await _verified(exporter, archive) for archive in known]

    told = _with_pool(work)
    if as_json:
        _json(told)
    else:
        show_table(["place", "events", "found"], [[one["location"], one["events"], one["found"]] for one in told])
    if any(one["found"] != "whole" for one in told):
        raise SystemExit(1)


async def _verified(exporter: Exporter, archive: Archive) -> dict[str, Any]:
    try:
        await exporter.verify(archive)
        found = "whole"
    except RetentionError as error:
        found = error.message
    return {"location": archive.location, "events": archive.events, "state": archive.state, "found": found}


async def _nothing() -> None:
    """Nobody stops this work."""


def _given(path: Path, place: str | None) -> tuple[RetentionPolicy, Storage | None]:
    policy, told = RetentionPolicy.load(path)
    place = place or told
    return policy, open_storage(place, os.environ) if place is not None else None


def _with_pool(work: Callable[[Pool], Coroutine[Any, Any, Any]]) -> Any:
    config = SomaConfig.from_env()

    async def inside() -> Any:
        async with _pool(config) as pool:
            return await work(pool)

    return asyncio.run(inside())


@asynccontextmanager
async def _pool(config: SomaConfig) -> AsyncIterator[Pool]:
    with dsn_of(config) as dsn:
        async with make_pool(config, dsn) as pool:
            yield pool


def _show_plan(plan: RetentionPlan, *, as_json: bool) -> None:
    if as_json:
        _json(asdict(plan))
        return
    rows = []
    for step in plan.steps:
        part = step.partition
        gone = ", ".join(step.expired) or "-"
        rows.append([part.name, f"{part.lower_position}-{part.upper_position - 1}", part.size, step.action, gone,
                     step.waits or "-"])  # fmt: skip
    if rows:
        show_table(["partition", "positions", "bytes", "action", "expired", "waits"], rows)
    else:
        click.echo("no partition of the log is past its time")
    for field in fields(plan.expired):
        click.echo(f"{field.name.replace('_', ' ')}: {getattr(plan.expired, field.name)}")


def _show_report(report: Report, *, as_json: bool) -> None:
    if as_json:
        _json(asdict(report))
        return
    for archive in report.removed:
        click.echo(f"removed {archive.events} events, kept in {plain(archive.location)}")
    for what, waits in report.waiting.items():
        click.echo(f"waits: {plain(what)}: {plain(waits)}")
    for table, count in report.swept.items():
        click.echo(f"{table.replace('_', ' ')}: {count} gone")
    if not (report.removed or report.waiting or any(report.swept.values())):
        click.echo("nothing is past its time")


def _forced(archive: Archive) -> str:
    return f"{archive.forced_by}: {archive.forced_why}" if archive.forced_by else "-"


def _json(value: Any) -> None:
    click.echo(json_text(value))
