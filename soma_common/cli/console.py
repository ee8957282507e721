"""``somastack console``: the web console, until Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Any

import click

from soma_common.cli.db import dsn_of
from soma_common.config import SomaConfig
from soma_common.errors import MissingDependency


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), help="Instead of SOMA_CONSOLE_PORT; 0 chooses a free one.")
@click.option("--app", metavar="MODULE:NAME", help="A Soma: its models check edits, its handlers run replays.")
def console(port: int | None, app: str | None) -> None:
    """Look at events, sagas, dead letters and replays in a browser, and act on them.

    It listens on loopback, for whoever is on this machine; on other addresses only with a token, or behind a proxy
    (docs/how-to/console.md). Tokens come from SOMA_CONSOLE_TOKEN_FILE and the like, never from the command line.
    """
    try:
        from soma_common.console.backend import open_backend
        from soma_common.console.serving import serve
        from soma_common.console.settings import ConsoleSettings
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"The console needs {error.name}.", cure="pip install 'soma-common[console]'."
        ) from error
    config, settings = SomaConfig.from_env(), ConsoleSettings.from_env()
    if port is not None:
        settings = replace(settings, port=port)

    async def run(dsn: str) -> None:
        async with open_backend(config, dsn, settings, _application(app)) as backend:
            await serve(settings, backend, _tell)

    try:
        with dsn_of(config) as dsn:
            asyncio.run(run(dsn))
    except KeyboardInterrupt:
        sys.exit(130)


def _application(name: str | None) -> Any:
    if name is None:
        return None
    from soma_common.cli.replaying import load_app

    return load_app(name)


def _tell(address: str) -> None:
    click.echo(f"console on {address}")
    sys.stdout.flush()
