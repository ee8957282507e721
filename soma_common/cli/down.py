"""``somastack down``: ends what ``somastack up`` started."""

from __future__ import annotations

import os
from pathlib import Path

import click

from soma_common.cli.examples import examples
from soma_common.cli.stack import compose, local
from soma_common.cli.stack.places import Places
from soma_common.escaping import json_text, plain


@click.command(epilog=examples(
    "somastack down", "the data stay for the next up",
    "somastack down --volumes --yes", "the data go too, without a question",
))  # fmt: skip
@click.option("--volumes", is_flag=True, help="Delete the data too. It asks, unless --yes is given.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--within", default=120.0, show_default=True, type=click.FloatRange(0, 3600),
              help="Seconds to wait for an `up` that is at work.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON in place of lines.")
def down(*, volumes: bool, yes: bool, within: float, as_json: bool) -> None:
    """End the servers that `somastack up` started in SOMA_FOLDER, and no others.

    They are known by process id and moment of birth. The embedded database ends when no other program uses it.

    Exit codes: 0 done, also where nothing ran; 1 something did not end, or its data are in use.
    """
    places = Places.of(os.environ)
    if volumes and not yes:
        click.confirm(f"Delete the data in {plain(str(places.folder))}?", abort=True, err=True)
    if not places.folder.is_dir():
        _tell([], as_json)
        return
    done: list[str] = []
    with places.alone(within):
        _end(places, done, volumes=volumes)
        places.forget()
    _tell(done, as_json)


def _end(places: Places, done: list[str], *, volumes: bool) -> None:
    before = places.read()
    if before is not None and before.compose:
        compose.stop(Path(before.compose), volumes=volumes)
        done.append("the services of the compose file: ended")
    local.stop(places, done.append)
    if volumes:
        local.delete(places, done.append)


def _tell(done: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json_text({"done": done}))
        return
    for line in done or ["nothing ran"]:
        click.echo(plain(line))
