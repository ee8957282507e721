"""``somastack worker``: runs the consumers, sagas and relay of an application as a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

import click

from soma_common.app import Soma
from soma_common.cli.examples import examples
from soma_common.cli.loading import complete_names, load
from soma_common.cli.log_options import Log, log_options
from soma_common.cli.reloading import supervise
from soma_common.cli.telling import complain
from soma_common.errors import ConfigurationError
from soma_common.escaping import plain
from soma_common.service import Service, run_until_signalled
from soma_common.wiring import send_spans


@click.command(epilog=examples(
    "somastack worker shop.app:soma", "all its consumers, and its sagas",
    "somastack worker shop.app:soma --consumer billing --no-sagas --health-port 9000", "one of them, with probes",
    "somastack worker shop.app:soma --relay --reload", "while you write it",
))  # fmt: skip
@click.argument("name", metavar="MODULE:NAME", shell_complete=complete_names)
@click.option("--consumer", "consumers", multiple=True, metavar="NAME", help="Only this one; repeat it.")
@click.option("--relay", is_flag=True, help="Also bring events from the outbox to Kafka.")
@click.option("--sagas/--no-sagas", default=None, help="Run its sagas.  [default: when no --consumer is named]")
@click.option("--health-port", type=click.IntRange(0, 65535), metavar="PORT",
              help="Serve health and metrics there; 0: any port.  [default: SOMA_HEALTH_PORT]")  # fmt: skip
@click.option("--drain", default=25.0, show_default=True, type=click.FloatRange(0.1, 3600),
              help="Seconds for what is under way, once it is to end.")  # fmt: skip
@click.option("--reload", "reloads", is_flag=True, help="Begin anew when a .py file changes. For development.")
@log_options
def worker(
    *, name: str, consumers: tuple[str, ...], relay: bool, sagas: bool | None, health_port: int | None, drain: float,
    reloads: bool, log: Log,
) -> None:  # fmt: skip
    """Run an application until SIGTERM or Ctrl-C, then drain.

    MODULE:NAME is a Soma, a list of them, or a function that makes one; the module is looked for from here. Several
    processes share the work.

    Exit codes: 0 drained, 1 it ended with an error, 2 it cannot be started as asked.
    """
    if reloads:
        raise SystemExit(supervise(patience=drain + 5.0))
    try:
        started = log.start()
        somas = applications(name)
        log.rename(started, somas[0].config.service_id)
        chosen = _consumers(somas, consumers)
        if sagas and not any(soma.saga_definitions for soma in somas):
            raise ConfigurationError("There are no sagas to run.", cure="pass Soma(sagas=[...]).")
    except ConfigurationError as error:
        complain(error)
        sys.exit(2)
    if relay and not any(soma.config.uses_kafka for soma in somas):
        click.echo("there is no relay in standalone mode: consumers read the log itself", err=True)
    send_spans(somas[0].config)
    asyncio.run(_run(somas, chosen, relay=relay, sagas=sagas, health_port=health_port, drain=drain))
    click.echo("drained")


def applications(name: str) -> list[Soma]:
    """The applications that ``MODULE:NAME`` stands for.

    Raises:
        ConfigurationError: there is no such name, or it is something else.
    """
    found = load(name, "application")
    if callable(found) and not isinstance(found, Soma | type):
        found = found()
    several = list(found) if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]
    strange = [type(each).__name__ for each in several if not isinstance(each, Soma)]
    if strange or not several:
        raise ConfigurationError(
            f"{name!r:.100} is {'empty' if not several else f'a {strange[0]}'}.",
            cure="name a Soma, a list of them, or a function without parameters that makes one.",
        )
    return several


def _consumers(somas: Sequence[Soma], wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """The consumers to run of each application. Raises ConfigurationError for one that none of them has."""
    known = {name for soma in somas for name in soma.consumers}
    strange = [name for name in wanted if name not in known]
    if strange:
        raise ConfigurationError(
            f"No consumer is called {strange[0]!r:.100}.", cure=f"known: {', '.join(sorted(known)) or 'none'}."
        )
    return [tuple(name for name in soma.consumers if name in wanted) for soma in somas]


async def _run(
    somas: Sequence[Soma], chosen: Sequence[tuple[str, ...]], *, relay: bool, sagas: bool | None,
    health_port: int | None, drain: float,
) -> None:  # fmt: skip
    async with AsyncExitStack() as stack:
        services: list[Service] = []
        for soma, names in zip(somas, chosen, strict=True):
            await stack.enter_async_context(soma)
            if names or not any(chosen):
                runs = sagas if sagas is None or soma.saga_definitions else None
                services += soma.services(*names, relay=relay, sagas=runs)
        port = somas[0].config.health_port if health_port is None else health_port
        probes = somas[0].probes(*services, port=port)
        said = _Said(f"runs {', '.join(service.name for service in services)}")
        await run_until_signalled(probes, *services, said, patience=drain)


class _Said(Service):
    """Says that all others have started. Who reads it may send SIGTERM: it is waited for by then."""

    def __init__(self, text: str) -> None:
        super().__init__("said")
        self._text = text

    async def run(self) -> None:
        click.echo(plain(self._text))
        await self.stopping.wait()
