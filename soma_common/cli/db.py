"""``somastack db``: the schema of the library in the application's database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import click

from soma_common.config import SomaConfig
from soma_common.postgres import migrate


@click.group()
def db() -> None:
    """The database: upgrade, status, repair. It is the one that SOMASTACK_POSTGRES_DSN names, else the embedded one."""


@db.command()
@click.option(
    "--grant-to", metavar="ROLE", help="Also give this role what an application needs: no DDL, no changes of events."
)
def upgrade(grant_to: str | None) -> None:
    """Apply missing migrations. Safe while applications run, and from several machines at once."""
    with database_dsn(SomaConfig.from_env()) as dsn:
        applied = asyncio.run(migrate.upgrade(dsn, grant_to=grant_to))
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("up to date")


@db.command()
def status() -> None:
    """What is applied. Exit code 1 when something is missing."""
    with database_dsn(SomaConfig.from_env()) as dsn:
        known = asyncio.run(migrate.status(dsn))
    for migration in known:
        when = f"{migration.applied_at:%Y-%m-%d %H:%M:%S}Z" if migration.applied_at else "missing"
        click.echo(f"{migration.version:04d}_{migration.name:<20} {when}")
    if any(migration.applied_at is None for migration in known):
        raise SystemExit(1)


@db.command()
@click.confirmation_option(prompt="Are all relays, consumers and writers of this database stopped?")
def repair() -> None:
    """After a restore into another cluster, a copy, or a promotion: let appends and readers go on. Nothing is lost.

    With SOMA_EXACTLY_ONCE the relay's cursors in Kafka are forgotten too: it resumes from the database's own.
    """
    config = SomaConfig.from_env()
    with database_dsn(config) as dsn:
        done = asyncio.run(migrate.repair(dsn))
    click.echo(f"cluster {done.old_cluster} -> {done.new_cluster}")
    click.echo(f"history until position {done.history_until}, era {done.new_era} begins after it")
    if config.uses_kafka and config.exactly_once:
        asyncio.run(_forget_relay_cursors(config))
        click.echo(f"the cursors of relay {config.service_id} in Kafka are forgotten")


async def _forget_relay_cursors(config: SomaConfig) -> None:
    from soma_common.kafka.publisher import forget_cursors
    from soma_common.outbox.relay import identities
    from soma_common.wiring import make_publishers

    publishers = make_publishers(config)
    try:
        await forget_cursors(publishers, identities(config.service_id))
    finally:
        await publishers.close()


@contextmanager
def database_dsn(config: SomaConfig) -> Iterator[str]:
    """The database of the environment; the embedded one is started for the command when it is not running."""
    if config.postgres_dsn:
        yield config.postgres_dsn
        return
    from soma_common.postgres.embedded import EmbeddedPostgres

    with EmbeddedPostgres(config.folder) as embedded:
        yield embedded.dsn
