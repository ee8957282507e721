"""``somastack up``: starts the servers that applications need, and leaves them running."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

import click

from soma_common.cli.examples import examples
from soma_common.cli.stack import compose, local
from soma_common.cli.stack.environment import exports, write_env
from soma_common.cli.stack.places import Places, Server, State, mode_of
from soma_common.cli.telling import complain
from soma_common.deployment import DeployMode
from soma_common.errors import ConfigurationError
from soma_common.escaping import json_text, plain

_NAMES = ", ".join(Server)


class _Servers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    name = "servers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[Server]:
        if isinstance(value, frozenset):
            return value
        names = [part.strip() for part in str(value).split(",") if part.strip()]
        unknown = [name for name in names if name not in set(Server)]
        if unknown or not names:
            self.fail(f"{', '.join(map(repr, unknown)) or 'nothing'} is no server; there are: {_NAMES}.", param, ctx)
        return frozenset(map(Server, names))


class _Port(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    name = "server=port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Server, int]:
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition("=")
        if name not in set(Server) or not (number.isascii() and number.isdigit() and 1 <= int(number[:6]) <= 65_535):
            self.fail(f"{value!r:.80}: write it as kafka=9092; servers: {_NAMES}.", param, ctx)
        return Server(name), int(number)


@click.command(epilog=examples(
    "somastack up", "the embedded database, for SOMA_DEPLOY_MODE=standalone",
    'eval "$(somastack up --mode somastack)"', "PostgreSQL, Kafka and a registry, known to this shell",
    "somastack up --mode somastack --only kafka,postgres --env .env", "two of them, known to a file",
))  # fmt: skip
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in DeployMode]),
    help="What to start.  [default: SOMA_DEPLOY_MODE, else standalone]",
)
@click.option("--only", type=_Servers(), metavar="NAMES", help=f"Of: {_NAMES}. A registry brings postgres along.")
@click.option("--port", "ports", type=_Port(), multiple=True, metavar="NAME=PORT", help="A port of your choice.")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "compose", "local"]),
              help="Containers, or processes of this machine.")  # fmt: skip
@click.option("--env", "env_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the variables there, and do not print them.")  # fmt: skip
@click.option("--within", default=120.0, show_default=True, type=click.FloatRange(1, 3600), help="Seconds per server.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of `export` lines.")
@click.pass_context
def up(
    ctx: click.Context, *, mode: DeployMode | str | None, only: frozenset[Server] | None,
    ports: tuple[tuple[Server, int], ...], backend: str, env_file: Path | None, within: float, as_json: bool,
) -> None:  # fmt: skip
    """Start the servers of a mode, and leave them running.

    standalone: the embedded database. somastack: PostgreSQL, Kafka and a schema registry, as containers or as processes
    of this machine (then with the extra `testing`). What runs already is left alone; data last from one `up` to the
    next. stdout has the variables for a shell, progress goes to stderr.

    Exit codes: 0 everything runs, 1 a server cannot be started, 2 this mode cannot be started from here.
    """
    chosen = DeployMode(mode) if mode is not None else mode_of(os.environ) or DeployMode.STANDALONE
    if chosen is DeployMode.K8S:
        complain(_NO_CHART)
        ctx.exit(2)
    places = Places.of(os.environ)
    wish = local.Wish(_wanted(chosen, only), dict(ports), within)
    with places.alone(within):
        _same_mode(places, chosen)
        state = _started(places, chosen, wish, backend)
        places.write(state)
    if env_file is not None:
        write_env(env_file, state.env)
        _say(f"variables: in {env_file}")
    if as_json:
        click.echo(json_text({"mode": state.mode, "servers": state.servers, "env": state.env}, indent=True))
    elif env_file is None:
        click.echo(exports(state.env))


def _started(places: Places, mode: DeployMode, wish: local.Wish, backend: str) -> State:
    if mode is DeployMode.STANDALONE:
        return local.start_embedded(places, wish, _say)
    file = compose.choose(backend)
    if file is None:
        return local.start_lane(places, wish, _say)
    compose.start(file, wish.servers, wish.within)
    _say(f"the services of {file} run")
    return State(mode.value, (), {"SOMA_DEPLOY_MODE": mode.value}, str(file))


def _wanted(mode: DeployMode, only: Collection[Server] | None) -> frozenset[Server]:
    if mode is DeployMode.STANDALONE:
        if only is not None and set(only) != {Server.POSTGRES}:
            raise click.UsageError("There is nothing but postgres in standalone mode.")
        return frozenset({Server.POSTGRES})
    wanted = frozenset(only or Server)
    return wanted | {Server.POSTGRES} if Server.REGISTRY in wanted else wanted


def _same_mode(places: Places, mode: DeployMode) -> None:
    before = places.read()
    if before is not None and before.mode != mode and places.keeper.who is not None:
        raise ConfigurationError(
            f"What runs in {places.folder} is of mode {before.mode}.",
            cure="`somastack down` first, or another SOMA_FOLDER.",
        )


def _say(text: str) -> None:
    sign = click.style("✓ ", fg="green") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ""
    click.echo(f"{sign}{plain(text)}", err=True)


_NO_CHART = ConfigurationError(
    "This release has no Helm chart: nothing was started.",
    cure="--mode somastack starts the same servers here; in a cluster, install them by your own means and set the "
    "SOMASTACK_ variables of your pods.",
)
