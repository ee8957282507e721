"""What an open application makes, it gives back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

from soma_common import DeployMode, Event, PayloadModels, SomaConfig
from soma_common.testing.backends import KafkaHandle
from soma_common.wiring import open_ground
from tests.core_support import until


async def test_a_relay_of_the_application_leaves_no_connection_open(
    soma_database: str, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]
) -> None:
    topic = soma_topic()
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, postgres_dsn=soma_database, kafka_bootstrap=soma_kafka.bootstrap, topic=topic
    )
    await _relay_one_event(config, topic)
    await asyncio.sleep(0)
    gc.collect()  # an open connection would warn here, and a warning is an error


async def _relay_one_event(config: SomaConfig, topic: str) -> None:
    ground = await open_ground(config, PayloadModels(), lambda _: topic)
    await ground.store.publish(Event(payload={}, tenant_id="t", aggregate_id="a", event_type="thing.done"))
    relay = ground.relay()
    async with relay:

        async def relayed() -> bool:
            return relay.stats().relayed == 1

        await until(relayed)
    await ground.close()
