"""``somastack topics``: the topics that a relay sends to, and the change of their partition counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import click

from soma_common.config import SomaConfig
from soma_common.errors import ConfigurationError
from soma_common.escaping import plain
from soma_common.events.codec import JsonCodec
from soma_common.kafka.admin import TopicAdmin
from soma_common.kafka.reader import ReaderSettings, TopicReader
from soma_common.kafka.unread import Unread, unread
from soma_common.outbox.parking import accept_partitions, list_parked, pinned
from soma_common.outbox.publishing import TopicRefused
from soma_common.outbox.topics import REFRESH
from soma_common.postgres.pool import Pool
from soma_common.wiring import make_pool

_TELL = 5.0  # seconds between two words of what is waited for
_LOOK = 0.5

_name = click.option(
    "--name", envvar="SOMA_SERVICE_ID", required=True, show_envvar=True, help="The relay, as it was started."
)


@dataclass(frozen=True, slots=True)
class _Servers:
    pool: Pool
    admin: TopicAdmin
    reader: TopicReader


@click.group()
def topics() -> None:
    """Topics of the relay: status, accept."""


@topics.command()
@_name
def status(name: str) -> None:
    """The partition counts that the relay goes by, and those that the topics have. Exit code 1 when one differs."""
    if not asyncio.run(_status(name)):
        raise SystemExit(1)


async def _status(name: str) -> bool:
    good = True
    async with _servers() as servers:
        for topic, count in (await pinned(servers.pool, name=name)).items():
            try:
                actual = str(await servers.admin.partitions(topic))
            except TopicRefused as refused:
                actual = refused.message
            good = good and actual == str(count)
            parked = len(await list_parked(servers.pool, name=name, topic=topic, limit=1000))
            told = "1000 or more rows" if parked == 1000 else f"{parked} rows"
            click.echo(plain(f"{topic}: the relay goes by {count} partitions, Kafka has {actual}; {told} parked"))
    return good


@topics.command()
@click.argument("topic")
@_name
@click.option(
    "--settle", default=REFRESH + 5.0, show_default=True, type=click.FloatRange(0, 3600),
    help="Seconds until every relay has noticed the new count and sends nothing.",
)  # fmt: skip
@click.option("--wait", default=600.0, show_default=True, type=click.FloatRange(0, 86_400), help="Seconds for readers.")
@click.option("--without", multiple=True, metavar="GROUP", help="Do not wait for this consumer group.")
@click.option("--force", is_flag=True, help="Wait for nobody: events of a key may be applied out of order.")
def accept(topic: str, name: str, settle: float, wait: float, without: tuple[str, ...], force: bool) -> None:
    """Let the relay go by the partition count that a topic has now.

    With another count keys move to other partitions. So a topic whose count was changed is paused: its rows are
    parked. This waits until that is so everywhere, and until every consumer group has read what was sent before; then
    the parked rows are sent, and no reader meets a key's events out of order.
    """
    asyncio.run(_accept(topic, name, settle, 0.0 if force else wait, None if force else without))


async def _accept(topic: str, name: str, settle: float, wait: float, without: Sequence[str] | None) -> None:
    async with _servers() as servers:
        before = (await pinned(servers.pool, name=name)).get(topic)
        if before is None:
            raise ConfigurationError(
                f"Relay {name} has never sent to topic {topic!r:.250}.", cure="see `somastack topics status`."
            )
        actual = await servers.admin.partitions(topic)
        if actual == before:
            click.echo(f"{topic} has {before} partitions, as the relay knows: nothing to do")
            return
        if without is not None:
            click.echo(
                f"{topic}: from {before} to {actual} partitions; waiting {settle:g} s until every relay has paused"
            )
            await asyncio.sleep(settle)
            await _all_read(servers, topic, before, wait, without)
        await accept_partitions(servers.pool, topic, actual, name=name)
        click.echo(f"{topic}: {actual} partitions from now on; what was parked is sent")


async def _all_read(servers: _Servers, topic: str, partitions: int, wait: float, without: Sequence[str]) -> None:
    """Until nobody has anything left to read."""
    end, told = time.monotonic() + wait, 0.0
    while left := await unread(servers.admin, servers.reader, topic, partitions, without=without):
        if time.monotonic() - told > _TELL:
            click.echo(plain(f"waiting for {_told(left)}"))
            told = time.monotonic()
        if time.monotonic() > end:
            raise ConfigurationError(
                f"Not everything of {topic} was read within {wait:g} s: {_told(left)}.",
                cure="start those consumers; or name groups that nobody uses any more with --without.",
            )
        await asyncio.sleep(_LOOK)


def _told(left: Sequence[Unread]) -> str:
    shown = [f"{each.group} at {each.offset} of {each.end} in {each.partition}" for each in left[:3]]
    return ", ".join(shown) + (f" and {len(left) - 3} more" if len(left) > 3 else "")


@asynccontextmanager
async def _servers() -> AsyncIterator[_Servers]:
    config = SomaConfig.from_env()
    if not config.uses_kafka:
        raise ConfigurationError("There are no topics in standalone mode.", cure="set SOMA_DEPLOY_MODE=somastack.")
    admin = TopicAdmin(config.kafka_bootstrap, config.kafka_security)
    reader = TopicReader(ReaderSettings(bootstrap=config.kafka_bootstrap, security=config.kafka_security), JsonCodec())
    try:
        async with make_pool(config) as pool:
            yield _Servers(pool, admin, reader)
    finally:
        await reader.close()
        await admin.close()
