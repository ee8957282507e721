"""Settings by the name of the consumer."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from soma_common import DeployMode, Soma, SomaConfig
from soma_common.consumer.order import Order
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.mirror import MirrorSettings
from soma_common.errors import ConfigurationError
from soma_common.kafka.admin import TopicAdmin
from soma_common.testing.backends import KafkaHandle


async def right(event: Any, ctx: Any) -> None: ...


def soma(dsn: str, **arguments: Any) -> Soma:
    return Soma(SomaConfig(service_id="shop", postgres_dsn=dsn), **arguments)


async def test_settings_by_consumer_are_those_of_the_named_one_only(soma_database: str) -> None:
    application = soma(soma_database, settings={"billing": ConsumerSettings(lanes=2)})
    application.handler("order.placed", consumer="billing")(right)
    application.handler("order.placed", consumer="stock")(right)
    async with application:
        assert application.consumer("billing").settings == ConsumerSettings(lanes=2)
        assert application.consumer("stock").settings == ConsumerSettings()


async def test_one_setting_is_for_all_consumers(soma_database: str) -> None:
    application = soma(soma_database, settings=ConsumerSettings(lanes=2))
    application.handler("order.placed", consumer="billing")(right)
    async with application:
        assert application.consumer("billing").settings == ConsumerSettings(lanes=2)


async def test_settings_of_a_consumer_without_handlers_are_refused(soma_database: str) -> None:
    """Its events would be handled by the defaults, and in another order maybe: a wrong name must not pass."""
    application = soma(soma_database, settings={"biling": ConsumerSettings(order=Order.PARTITION)})
    application.handler("order.placed", consumer="billing")(right)
    async with application:  # who only publishes need not have the handlers
        for made in (application.consumer, application.replays):
            with pytest.raises(ConfigurationError, match="settings names consumer 'biling'") as error:
                made("billing")
            assert "known: billing" in str(error.value.cure)
        with pytest.raises(ConfigurationError, match="biling"):
            await application.drain()


async def test_each_named_mirror_gets_its_topic(soma_kafka: KafkaHandle, soma_database: str) -> None:
    unique = uuid4().hex[:8]
    names = [f"soma.copies.{unique}.{number}" for number in range(2)]
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, service_id=f"shop-{unique}", postgres_dsn=soma_database,
        kafka_bootstrap=soma_kafka.bootstrap,
    )  # fmt: skip
    settings = {name: ConsumerSettings(mirror=MirrorSettings(name)) for name in names}
    async with Soma(config, settings=settings):
        pass
    admin = TopicAdmin(soma_kafka.bootstrap)
    try:
        assert [await admin.partitions(name) for name in names] == [3, 3]
    finally:
        await admin.close()
