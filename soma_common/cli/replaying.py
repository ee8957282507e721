"""What commands on events and replays share: which events, of which application, and to whom."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import click

from soma_common.app import Soma
from soma_common.cli.db import dsn_of
from soma_common.cli.loading import load
from soma_common.cli.tenants import whose
from soma_common.config import SomaConfig
from soma_common.errors import ConfigurationError
from soma_common.events.append import AppendSettings
from soma_common.events.store import EventStore
from soma_common.moments import TIMES, utc
from soma_common.replay.engine import ReplayEngine
from soma_common.replay.models import ReplayMode
from soma_common.replay.projection import Projection
from soma_common.retention.places import open_storage
from soma_common.retention.reader import ArchiveReader
from soma_common.wiring import make_pool

Command = Callable[..., Any]


def filters(command: Command) -> Command:
    """The options that say which events."""
    options = [
        click.option("--tenant", "tenant_id", metavar="NAME"),
        click.option("--all-tenants", is_flag=True, help="Events of every tenant."),
        click.option("--trace-id", "--trace", "trace_id", metavar="ID", help="32 hexadecimal digits."),
        click.option(
            "--from",
            "--since",
            "since",
            type=click.DateTime(TIMES),
            metavar="TIME",
            help="Inclusive; UTC unless it has an offset.",
        ),
        click.option("--to", "--until", "until", type=click.DateTime(TIMES), metavar="TIME", help="Exclusive."),
        click.option("--service", "service_id", metavar="NAME"),
        click.option("--type", "event_type", metavar="TYPE"),
        click.option("--aggregate-type", metavar="TYPE"),
        click.option("--aggregate", "aggregate_id", metavar="ID"),
        click.option("--json", "json", is_flag=True, help="One JSON object per line."),
    ]
    return _with(command, options)


def conditions_of(given: dict[str, Any]) -> dict[str, Any]:
    """The options as conditions; times without an offset are UTC."""
    given["tenant_id"] = whose("events", given["tenant_id"], given.pop("all_tenants"))
    times = {name: utc(given[name]) for name in ("since", "until")}
    return given | times


def replay_options(command: Command) -> Command:
    """The options that say what a replay is."""
    options = [
        click.option(
            "--mode", default="missing", show_default=True, type=click.Choice(["missing", "rebuild", "force"])
        ),
        click.option(
            "--source", type=click.Choice(["log", "kafka"]), help="Where to read; without it, where the consumer does."
        ),
    ]
    return _with(command, options)


def order_options(command: Command) -> Command:
    """The options of a replay that is to be recorded."""
    options = [
        click.option(
            "--table", "tables", multiple=True, metavar="NAME", help="A table that --mode rebuild fills; repeat it."
        ),
        click.option(
            "--schema", default="public", show_default=True, metavar="NAME", help="The schema of these tables."
        ),
        click.option(
            "--create", type=click.File("r"), metavar="FILE", help="SQL that makes the new tables, if they differ."
        ),
    ]
    return _with(command, options)


def audit_options(command: Command) -> Command:
    """How fast, who wants it and why."""
    options = [
        click.option("--rate", type=float, help="Most events per second."),
        click.option("--by", "requested_by", default="", help="Who wants it; --mode force asks for it."),
        click.option("--why", "reason", default="", help="Why; --mode force asks for it."),
    ]
    return _with(command, options)


def _with(command: Command, options: list[Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def projection_of(mode: ReplayMode, tables: tuple[str, ...], schema: str, create: Any) -> Projection | None:
    """The tables that a rebuild fills, as the options name them."""
    if mode is not ReplayMode.REBUILD:
        if tables or create:
            raise click.UsageError("--table and --create go with --mode rebuild.")
        return None
    return Projection(tables, schema, create.read() if create else None) if tables else None


def scanned(passed: int, total: int) -> None:
    """Of a scan of Kafka, on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r{passed} of {total} offsets", err=True, nl=passed >= total)


def archive_of(place: str | None) -> ArchiveReader | None:
    """The archives of a place, if one is named."""
    return ArchiveReader(open_storage(place, os.environ)) if place is not None else None


@asynccontextmanager
async def open_store() -> AsyncIterator[EventStore]:
    """The store of the environment's database."""
    config = SomaConfig.from_env()
    with dsn_of(config) as dsn:
        async with make_pool(config, dsn) as pool:
            yield EventStore(pool, AppendSettings(config.service_id or "somastack"))


@asynccontextmanager
async def engine_of(
    consumer: str, app: str | None, archive: ArchiveReader | None, *, applies: bool
) -> AsyncIterator[ReplayEngine]:  # fmt: skip
    """The replays of a consumer: with the application's handlers, or (to plan, pause and cancel) without."""
    async with AsyncExitStack() as stack:
        if app is not None:
            soma = await stack.enter_async_context(load_app(app))
            yield await stack.enter_async_context(soma.replays(consumer, archive=archive))
            return
        if applies:
            raise ConfigurationError("No application is named.", cure="pass --app MODULE:NAME, or --dry-run.")
        config = SomaConfig.from_env()
        dsn = stack.enter_context(dsn_of(config))
        yield await stack.enter_async_context(ReplayEngine(make_pool(config, dsn).settings, consumer, archive=archive))


def load_app(name: str) -> Soma:
    """The application that ``module:NAME`` stands for.

    Raises:
        ConfigurationError: there is no such module or name, or it is no Soma.
    """
    found = load(name, "application")
    if not isinstance(found, Soma):
        raise ConfigurationError(f"{name!r:.100} is a {type(found).__name__}.", cure="name a Soma.")
    return found
