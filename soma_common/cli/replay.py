"""``somastack replay``: runs that give recorded events to a consumer again."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from soma_common.cli.examples import examples
from soma_common.cli.interrupting import interruptible
from soma_common.cli.loading import complete_names
from soma_common.cli.replaying import (
    Command,
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
from soma_common.cli.show import show_plan, show_runs, show_state, watch
from soma_common.escaping import plain
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import ReplayFilter, ReplayMode, ReplayState


@click.group(epilog=examples(
    "somastack replay plan --tenant acme --consumer sales --from 2026-11-01", "what it would read; nothing happens",
    "somastack replay start --tenant acme --consumer sales --from 2026-11-01", "record it: prints the run's id",
    "somastack replay run RUN --app shop.app:soma", "apply it here, to its end",
))  # fmt: skip
def replay() -> None:
    """Replays: plan, start, run, pause, resume, cancel, list.

    A run is recorded by `start` and applied by `run`, in this process or another, and goes on exactly where a killed
    one stood. `somastack events replay` does both at once.
    """


_consumer = click.option("--consumer", default="default", show_default=True, metavar="NAME")
_run_id = click.argument("run_id", metavar="RUN")
_archive = click.option("--archive", "place", metavar="PLACE", help="Where events are that were removed from the log.")
_json = click.option("--json", "json", is_flag=True, help="One JSON object.")


def _app(required: bool) -> Command:
    return click.option(
        "--app", metavar="MODULE:NAME", required=required, shell_complete=complete_names,
        help="The Soma whose handlers apply the events." if required else "The Soma, where --source is kafka.",
    )  # fmt: skip


@replay.command(epilog=examples("somastack replay plan --all-tenants --consumer sales", "counts by type, service, day"))
@filters
@_consumer
@_app(False)
@replay_options
@_archive
def plan(*, consumer: str, app: str | None, mode: str, source: str | None, place: str | None, **given: Any) -> None:
    """What a replay would read. Nothing is applied or recorded."""
    json, wanted = given.pop("json"), ReplayFilter(**conditions_of(given))

    async def work() -> None:
        async with engine_of(consumer, app, archive_of(place), applies=False) as engine:
            show_plan(await engine.plan(wanted, ReplayMode(mode), source=source, told=scanned), json=json)

    interruptible(work)


@replay.command(epilog=examples(
    "somastack replay start --tenant acme --mode force --by ann --why 'case 7'", "also what was applied already",
    "somastack replay start --all-tenants --mode rebuild --table sales", "a table anew, beside the live one",
))  # fmt: skip
@filters
@_consumer
@_app(False)
@replay_options
@order_options
@audit_options
@_archive
def start(*, consumer: str, app: str | None, mode: str, place: str | None, **given: Any) -> None:
    """Record a run; `run` applies it. What it covers is fixed now."""
    json, kind = given.pop("json"), ReplayMode(mode)
    order = {name: given.pop(name) for name in ("rate", "requested_by", "reason", "source")}
    order["projection"] = projection_of(kind, *(given.pop(name) for name in ("tables", "schema", "create")))
    wanted = ReplayFilter(**conditions_of(given))

    async def work() -> None:
        async with engine_of(consumer, app, archive_of(place), applies=False) as engine:
            show_state(await engine.start(wanted, kind, **order), json=json)

    interruptible(work)


@replay.command(epilog=examples("somastack replay run RUN --consumer sales --app shop.app:soma", "until it is done"))
@_run_id
@_consumer
@_app(True)
@click.option("--no-swap", is_flag=True, help="End a rebuild when it has caught up; run it again to swap.")
@_archive
@_json
def run(*, run_id: str, consumer: str, app: str, no_swap: bool, place: str | None, json: bool) -> None:
    """Apply a run to its end, or go on with one whose process is gone; one that is paused or failed is resumed.

    Exit code 1 when an event failed: the run stands before it.
    """

    async def work() -> None:
        async with engine_of(consumer, app, archive_of(place), applies=True) as engine:
            found = await engine.progress(run_id)
            if found.state in (ReplayState.PAUSED, ReplayState.FAILED):
                found = await engine.resume(run_id)
            click.echo(plain(f"replay {found.run_id} of {consumer}"), err=True)
            await watch(engine.run(found.run_id, swap=not no_swap), last=found, json=json)

    interruptible(work)


def _turn(name: str, text: str) -> click.Command:
    """A command that brings a run into another state."""

    @replay.command(name, help=text, epilog=examples(f"somastack replay {name} RUN --consumer sales", f"{name} it"))
    @_run_id
    @_consumer
    @_json
    def turn(*, run_id: str, consumer: str, json: bool) -> None:
        async def work() -> None:
            async with engine_of(consumer, None, None, applies=False) as engine:
                show_state(await getattr(engine, name)(run_id), json=json)

        asyncio.run(work())

    return turn


_turn("pause", "Stop a run; it can be resumed. When this returns, no further effect of it commits.")
_turn("resume", "Let a paused or failed run be run again, from where it stands.")
_turn("cancel", "End a run for good. What it applied stays; the tables of a rebuild are dropped.")


@replay.command("list", epilog=examples("somastack replay list --limit 5 --json", "the newest five, for programs"))
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "json", is_flag=True, help="One JSON object per line.")
def list_runs(*, limit: int, json: bool) -> None:
    """The replays of every consumer, the newest first."""

    async def query() -> None:
        async with open_store() as store:
            show_runs(await Checkpoints(store.pool).newest(limit), json=json)

    asyncio.run(query())
