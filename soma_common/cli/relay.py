"""``somastack relay``: the outbox relay as a process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import click

from soma_common.cli.log_options import Log, log_options
from soma_common.config import SomaConfig
from soma_common.health import HealthServer
from soma_common.kafka.publisher import KafkaPublishers
from soma_common.outbox.metrics import relay_health, relay_metrics
from soma_common.outbox.relay import Relay
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import Pool
from soma_common.service import run_until_signalled
from soma_common.wiring import make_pool, make_publishers, send_spans

_DRAIN = 25.0  # seconds; Kubernetes kills after 30


@click.command()
# Required: the name is part of the transactional ids in Kafka, and an application's own relay goes by the service's
# name too. Under two names one outbox is relayed twice; under one name two databases fence each other.
@click.option(
    "--name", envvar="SOMA_SERVICE_ID", required=True, show_envvar=True, help="Workers of one name share the outbox."
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 8), help="Workers in this process.")
@click.option(
    "--exactly-once/--at-least-once", default=None, help="Kafka transactions or not.  [default: SOMA_EXACTLY_ONCE]"
)
@click.option("--lease", default=10.0, show_default=True, type=click.FloatRange(0.5, 300), help="Seconds.")
@click.option("--rows", default=20_000, show_default=True, type=click.IntRange(8, 1_000_000), help="Most in flight.")
@click.option("--health-port", type=click.IntRange(0, 65535), help="Serve /healthz and /metrics there; 0: any port.")
@click.option("--drain", default=10.0, show_default=True, type=click.FloatRange(0.1, 300), help="Seconds.")
@log_options
def relay(
    name: str,
    workers: int,
    exactly_once: bool | None,
    lease: float,
    rows: int,
    health_port: int | None,
    drain: float,
    log: Log,
) -> None:
    """Bring events from the outbox to Kafka until SIGTERM, then drain."""
    config = SomaConfig.from_env()
    publishers = make_publishers(config)
    log.start(name)
    send_spans(config, name)
    settings = RelaySettings(rows=rows, transaction_rows=max(1, rows // 2), drain=drain)
    pool = make_pool(config)
    chosen = config.exactly_once if exactly_once is None else exactly_once

    def worker() -> Relay:
        return Relay(pool, publishers, name=name, exactly_once=chosen, lease=lease, settings=settings)

    mode = "exactly once" if chosen else "at least once"
    click.echo(f"relay {name}: {workers} worker(s), {mode}, to {config.kafka_bootstrap}")
    asyncio.run(_run(pool, publishers, [worker] * workers, health_port=health_port, drain=drain))


async def _run(
    pool: Pool,
    publishers: KafkaPublishers,
    workers: Sequence[Callable[[], Relay]],
    *,
    health_port: int | None,
    drain: float,
) -> None:
    relays = [worker() for worker in workers]
    health = HealthServer(
        lambda: relay_health([one.stats() for one in relays]),
        lambda: relay_metrics([one.stats() for one in relays]),
        port=health_port or 0,
    )
    if health_port is not None:
        await health.start()
        click.echo(f"health on port {health.port}")
    try:
        async with pool:
            await run_until_signalled(*relays, patience=max(_DRAIN, drain + 5.0))
    finally:
        await health.stop()
        await publishers.close()
    click.echo(f"{relays[0].name}: drained, {sum(one.stats().relayed for one in relays)} rows relayed")
