"""What an application stands on, by mode: standalone (embedded database, the log as source) or Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from soma_common.config import SomaConfig
from soma_common.consumer.source import Source
from soma_common.consumer.worker import ConsumerWorker
from soma_common.errors import ConfigurationError
from soma_common.events.append import AppendSettings
from soma_common.events.codec import Codec, JsonCodec
from soma_common.events.models import Event
from soma_common.events.payloads import PayloadModels
from soma_common.events.store import EventStore
from soma_common.log.source import LogSource
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.service import Service
from soma_common.sql.loader import blocks
from soma_common.tracing.tracer import TransactionTracer


class Ground:
    """Connections, store and codec of an open application."""

    def __init__(self, config: SomaConfig, pool: Pool, store: EventStore, closing: AsyncExitStack) -> None:
        self.config, self.pool, self.store = config, pool, store
        self._closing = closing

    def source(self, consumer: str) -> Source:
        """Where a consumer's events come from."""
        return LogSource(self.pool, consumer)

    def relay(self) -> Service:
        """An outbox relay."""
        raise ConfigurationError("There is no relay in this mode.")

    async def caught_up(self, worker: ConsumerWorker, tick: int) -> None:
        """Until a consumer of the log has passed a tick; raises what stopped it."""
        source = worker.source
        if not isinstance(source, LogSource):
            raise ConfigurationError("Only consumers of the log can be drained.", cure="run them instead.")
        while not (await self.pool.fetch(blocks("readers")["passed"], source.reader, tick))[0][0]:
            for failure in worker.stats().failures:
                raise failure.error
            if await worker.pause(0.01):
                return

    async def close(self) -> None:
        """Disconnect, and let go of the embedded database."""
        await self._closing.aclose()


async def open_ground(config: SomaConfig, models: PayloadModels, topic: Callable[[Event], str]) -> Ground:
    """Connect to what the settings name."""
    async with AsyncExitStack() as stack:
        dsn = config.postgres_dsn or await _embedded(config, stack)
        pool = await stack.enter_async_context(Pool(_pool_settings(config, dsn)))
        codec: Codec = JsonCodec()
        settings = AppendSettings(
            config.service_id,
            models,
            codec,
            route=topic if config.uses_kafka else None,
            current_trace=TransactionTracer().current,
        )
        return Ground(config, pool, EventStore(pool, settings), stack.pop_all())


async def _embedded(config: SomaConfig, stack: AsyncExitStack) -> str:
    """Start the embedded database, or share it with the processes that have it open; apply migrations."""
    from soma_common.postgres.embedded import EmbeddedPostgres

    embedded = EmbeddedPostgres(config.folder)
    dsn = await asyncio.to_thread(embedded.start)
    stack.push_async_callback(asyncio.to_thread, embedded.stop)
    await upgrade(dsn)
    return dsn


def _pool_settings(config: SomaConfig, dsn: str) -> PoolSettings:
    return PoolSettings(dsn, size=config.pool_size, transaction_pooler=config.postgres_pooler)
