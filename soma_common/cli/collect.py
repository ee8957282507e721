"""``somastack collect``: the central log of all services."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

import click

from soma_common.cli.log_options import Log, log_options
from soma_common.cli.telling import reporting
from soma_common.collector.collecting import NOT_EVENTS, PREFIX, Collector, CollectorSettings
from soma_common.collector.copying import Copied, copy_log
from soma_common.config import SomaConfig
from soma_common.errors import ConfigurationError, SomaError
from soma_common.events.payloads import PayloadModels
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool
from soma_common.probes import Probes
from soma_common.service import run_until_signalled
from soma_common.wiring import make_pool, open_ground


@click.command()
@click.option("--prefix", default=PREFIX, show_default=True, help="Topics whose names begin so.")
@click.option(
    "--without", multiple=True, metavar="TOPIC", default=NOT_EVENTS, show_default=True,
    help="One of them that holds no events. May be repeated.",
)  # fmt: skip
@click.option("--look-every", default=30.0, show_default=True, type=click.FloatRange(0.1, 86_400), help="Seconds.")
@click.option(
    "--name", envvar="SOMA_SERVICE_ID", default="collector", show_default=True, show_envvar=True,
    help="Processes of one name share the topics.",
)  # fmt: skip
@click.option(
    "--from-log", "logs", multiple=True, metavar="DSN",
    help="Copy what this service's own database has so far, and end. May be repeated.",
)  # fmt: skip
@click.option("--health-port", type=click.IntRange(0, 65535), metavar="PORT",
              help="Serve health and metrics there; 0: any port.  [default: SOMA_HEALTH_PORT]")  # fmt: skip
@log_options
@reporting(SomaError)
def collect(
    prefix: str, without: Sequence[str], look_every: float, name: str, logs: Sequence[str], health_port: int | None,
    log: Log,
) -> None:  # fmt: skip
    """Keep a central log of what all services recorded, until SIGTERM.

    SOMASTACK_POSTGRES_DSN names its database, which is brought up to date, and which no service may write to: there
    `somastack events list`, `somastack saga inspect` and the console show all services at once.

    \b
    Examples:
      somastack collect
      somastack collect --from-log postgresql://reader@shop-db/shop --from-log postgresql://reader@stock-db/stock
    """
    config = SomaConfig.from_env(service_id=name)
    if not config.postgres_dsn:
        raise ConfigurationError(
            "The central log has no database.", cure="set SOMASTACK_POSTGRES_DSN to one of its own."
        )
    log.start(name)
    port = config.health_port if health_port is None else health_port
    settings = CollectorSettings(prefix=prefix, without=without, look_every=look_every)
    asyncio.run(_copy(config, logs) if logs else _collect(config, settings, port))


async def _collect(config: SomaConfig, settings: CollectorSettings, port: int | None) -> None:
    from soma_common.kafka.admin import TopicAdmin

    if not config.uses_kafka:
        raise ConfigurationError(
            "There is no Kafka in standalone mode.", cure="set SOMA_DEPLOY_MODE=somastack, or pass --from-log."
        )
    await upgrade(config.postgres_dsn)
    ground = await open_ground(config, PayloadModels(), lambda event: config.topic)
    admin = TopicAdmin(config.kafka_bootstrap, config.kafka_security)
    try:
        collector = Collector(ground.pool, admin, lambda topics: ground.source("collector", topics), settings)
        await run_until_signalled(Probes([collector], ground.pool, port=port), collector)
    finally:
        await admin.close()
        await ground.close()


async def _copy(config: SomaConfig, logs: Sequence[str]) -> None:
    await upgrade(config.postgres_dsn)
    async with AsyncExitStack() as stack:
        central = await stack.enter_async_context(make_pool(config))
        for number, dsn in enumerate(logs, 1):
            service = await stack.enter_async_context(Pool(dsn))
            done = Copied(0, 0)
            async for done in copy_log(service, central):
                if sys.stderr.isatty():
                    click.echo(f"\rlog {number} of {len(logs)}: {done.read:,} events read", nl=False, err=True)
            if sys.stderr.isatty():
                click.echo(err=True)
            click.echo(f"log {number} of {len(logs)}: {done.read} events read, {done.fresh} of them new")
