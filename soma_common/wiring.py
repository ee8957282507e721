"""What an application stands on, by mode: standalone (embedded database, the log as source) or Kafka."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from soma_common.config import SomaConfig
from soma_common.consumer.source import Source
from soma_common.consumer.worker import ConsumerWorker
from soma_common.errors import ConfigurationError, HandlerFailed, MissingDependency
from soma_common.events.append import AppendSettings
from soma_common.events.codec import Codec, JsonCodec
from soma_common.events.models import Event
from soma_common.events.payloads import PayloadModels
from soma_common.events.store import EventStore
from soma_common.log.source import LogSource
from soma_common.outbox.relay import Relay
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.topics import Topics
from soma_common.sql.loader import blocks
from soma_common.tracing.setup import configure_tracing
from soma_common.tracing.store_spans import StoreSpans
from soma_common.tracing.tracer import TransactionTracer

if TYPE_CHECKING:
    from soma_common.kafka.publisher import KafkaPublishers

log = logging.getLogger(__name__)

_MIRRORED = 30 * 86_400_000  # milliseconds for which copies of dead letters are kept


class Ground:
    """Connections, store and codec of an open application."""

    def __init__(self, config: SomaConfig, pool: Pool, store: EventStore, closing: AsyncExitStack) -> None:
        self.config, self.pool, self.store = config, pool, store
        self._closing = closing

    def source(self, consumer: str, topics: Sequence[str]) -> Source:
        """Where a consumer's events come from: the topics, or in standalone the log itself."""
        if not self.config.uses_kafka:
            return LogSource(self.pool, consumer)
        from soma_common.kafka.member import SourceSettings
        from soma_common.kafka.source import KafkaSource

        settings = SourceSettings(
            bootstrap=self.config.kafka_bootstrap,
            security=self.config.kafka_security,
            group=f"soma.{self.config.service_id}.{consumer}",
            topics=tuple(topics),
            instance=self.config.instance,
        )
        return KafkaSource(self.pool, settings, self.store.settings.codec)

    def topics(self) -> Callable[[], Topics] | None:
        """Makes readers of Kafka that stand beside its consumers; None in standalone."""
        if not self.config.uses_kafka:
            return None
        from soma_common.kafka.reader import ReaderSettings, TopicReader

        settings = ReaderSettings(bootstrap=self.config.kafka_bootstrap, security=self.config.kafka_security)
        return lambda: TopicReader(settings, self.store.settings.codec)

    def relay(self) -> Relay:
        """An outbox relay, connected to Kafka when it starts."""
        return make_relay(self.config, self.pool, self._closing)

    async def caught_up(self, worker: ConsumerWorker, tick: int) -> None:
        """Until a consumer of the log has passed a tick and tried the letters that are due; raises what stopped it."""
        source = worker.source
        if not isinstance(source, LogSource):
            raise ConfigurationError("Only consumers of the log can be drained.", cure="run them instead.")
        while not (await self.pool.fetch(blocks("readers")["passed"], source.reader, tick))[0][0]:
            for error in worker.stats().halted.values():
                raise error
            if await worker.pause(0.01):
                return
        while (await self.pool.fetch(blocks("dead_letters")["any_due"], worker.consumer))[0][0]:
            if await worker.pause(0.01):
                return
        tally = worker.stats().tally
        failed = tally.dead + tally.parked
        if failed:
            raise HandlerFailed(
                f"{failed} of the events that consumer {worker.consumer} met failed: see its dead letters.",
                cure=f"see `somastack dlq list --all-tenants --consumer {worker.consumer}`.",
            )

    async def close(self) -> None:
        """Disconnect, and let go of the embedded database."""
        await self._closing.aclose()


def send_spans(config: SomaConfig, service: str = "") -> None:
    """Send this process's spans where the settings say, if they do, and if nobody has set a TracerProvider."""
    if not config.otlp_endpoint:
        return
    try:
        configure_tracing(service=service or config.service_id, endpoint=config.otlp_endpoint)
    except MissingDependency as error:  # the variable is for a whole stack: no reason to do no work
        log.warning("Spans are not sent: %s", error)


def make_relay(config: SomaConfig, pool: Pool, closing: AsyncExitStack) -> Relay:
    """A relay from the outbox of this database to the Kafka of the settings; ``closing`` ends its connections.

    Raises:
        ConfigurationError: there is no Kafka in this mode.
    """
    publishers = make_publishers(config)
    closing.push_async_callback(publishers.close)
    return Relay(pool, publishers, name=config.service_id, exactly_once=config.exactly_once)


def make_publishers(config: SomaConfig) -> KafkaPublishers:
    """The producers of the Kafka of the settings; the caller closes them.

    Raises:
        ConfigurationError: there is no Kafka in this mode.
    """
    from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings

    if not config.uses_kafka:
        raise ConfigurationError(
            "There is no relay in standalone mode: consumers read the log itself.",
            cure="set SOMA_DEPLOY_MODE=somastack.",
        )
    return KafkaPublishers(PublisherSettings(bootstrap=config.kafka_bootstrap, security=config.kafka_security))


def make_pool(config: SomaConfig, dsn: str = "") -> Pool:
    """Connections to the database of the settings, or to ``dsn``; not open yet."""
    settings = PoolSettings(
        dsn or config.postgres_dsn, size=config.pool_size, transaction_pooler=config.postgres_pooler
    )
    return Pool(settings)


async def open_ground(config: SomaConfig, models: PayloadModels, route: Callable[[Event], str]) -> Ground:
    """Connect to what the settings name."""
    async with AsyncExitStack() as stack:
        dsn = config.postgres_dsn or await _embedded(config, stack)
        pool = await stack.enter_async_context(make_pool(config, dsn))
        settings = await _append_settings(config, models, route, stack)
        return Ground(config, pool, EventStore(pool, settings), stack.pop_all())


def sync_settings(config: SomaConfig, models: PayloadModels, route: Callable[[Event], str]) -> AppendSettings:
    """What a synchronous store needs. Asks the registry, if there is one, for the ids of the schemas."""

    async def resolved() -> AppendSettings:
        async with AsyncExitStack() as stack:  # writing needs the ids only: the registry may be left again
            return await _append_settings(config, models, route, stack)

    with ThreadPoolExecutor(1) as thread:  # the caller's thread may have a running loop
        return thread.submit(asyncio.run, resolved()).result()


async def _append_settings(
    config: SomaConfig, models: PayloadModels, route: Callable[[Event], str], stack: AsyncExitStack
) -> AppendSettings:
    tracer = TransactionTracer()
    return AppendSettings(
        config.service_id,
        models,
        await make_codec(config, models, stack),
        route=route if config.uses_kafka else None,
        current_trace=tracer.current,
        spans=StoreSpans(tracer),
    )


async def ensure_topics(config: SomaConfig, topics: Iterable[str], *, mirrors: Iterable[str] = ()) -> None:
    """Make the application's own topics, and those of its dead letters' copies, where they are missing and it may;
    otherwise say so and go on.
    """
    from soma_common.kafka.admin import TopicAdmin, TopicSettings

    admin = TopicAdmin(config.kafka_bootstrap, config.kafka_security)
    try:
        wanted = [TopicSettings(topic) for topic in sorted(set(topics))]
        copies = {"retention.ms": str(_MIRRORED)}
        wanted += [TopicSettings(topic, partitions=3, config=copies) for topic in sorted(mirrors)]
        await admin.ensure(wanted)
    except ConfigurationError as error:
        log.warning("Topics are not made here: %s", error)
    finally:
        await admin.close()


async def make_codec(config: SomaConfig, models: PayloadModels, stack: AsyncExitStack) -> Codec:
    """Avro with the registry's ids resolved, or JSON where there is no registry."""
    if not config.registry_url:
        return JsonCodec()
    from soma_common.schemas.address import RegistryAuth
    from soma_common.schemas.avro import event_schemas
    from soma_common.schemas.avro_codec import AvroCodec
    from soma_common.schemas.registry import Registry

    snapshot = config.folder / "schemas.json"
    try:
        await asyncio.to_thread(snapshot.parent.mkdir, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder for the snapshot of the schemas cannot be made: {error}.",
            cure="set SOMA_FOLDER to a folder that this process may write to.",
        ) from error
    auth = RegistryAuth(token=config.registry_token) if config.registry_token else None
    registry = Registry(config.registry_url, group=config.service_id, auth=auth, snapshot=snapshot)
    await stack.enter_async_context(registry)
    await registry.resolve(event_schemas(models.values()))
    return AvroCodec(registry)


async def _embedded(config: SomaConfig, stack: AsyncExitStack) -> str:
    """Start the embedded database, or share it with the processes that have it open; apply migrations."""
    from soma_common.postgres.embedded import EmbeddedPostgres

    embedded = EmbeddedPostgres(config.folder)
    dsn = await asyncio.to_thread(embedded.start)
    stack.push_async_callback(asyncio.to_thread, embedded.stop)
    await upgrade(dsn)
    return dsn
