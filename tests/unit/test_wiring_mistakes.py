"""What is wired wrongly is refused where it is written, before an event fails for it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from soma_common import DeployMode, Payload, PayloadModels, Soma, SomaConfig
from soma_common.consumer.handlers import Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.mirror import MirrorSettings
from soma_common.errors import ConfigurationError, SomaError
from soma_common.events.append import AppendSettings
from soma_common.events.store import EventStore
from soma_common.kafka.source import KafkaSource
from soma_common.wiring import Ground, make_pool


class OrderPlaced(Payload, event_type="order.placed"):
    item: str


class Bound:
    async def handle(self, event: Any, ctx: Any) -> None: ...


async def one(event: Any) -> None: ...


async def three(event: Any, ctx: Any, more: Any) -> None: ...


async def named(event: Any, *, ctx: Any) -> None: ...


async def right(event: Any, ctx: Any, more: int = 0) -> None: ...


def soma(**arguments: Any) -> Soma:
    return Soma(SomaConfig(service_id="shop"), **arguments)


def test_a_decorator_without_its_parentheses_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="right is no event type") as error:
        soma().handler(right)  # type: ignore[arg-type]  # the mistake
    assert "@soma.handler(" in str(error.value.cure)


@pytest.mark.parametrize("wanted", [1, ["order.placed"], OrderPlaced(item="a"), dict, Payload, "Order Placed"])
def test_what_is_no_event_type_is_refused(wanted: Any) -> None:
    with pytest.raises(SomaError):
        soma().handler(wanted)
    with pytest.raises(SomaError):
        Handlers().add(right, wanted)


@pytest.mark.parametrize("handle", [one, three, named, Bound.handle, lambda: None])
@pytest.mark.parametrize("batch", [False, True])
def test_a_handler_that_cannot_be_called_is_refused(handle: Any, batch: bool) -> None:
    with pytest.raises(ConfigurationError, match="cannot be called"):
        soma().handler("order.placed", batch=batch)(handle)


def test_what_can_be_called_with_two_is_taken() -> None:
    handlers = Handlers()
    for number, handle in enumerate((right, Bound().handle)):
        handlers.add(handle, f"thing.done{number}")
    Handlers().add(lambda *given: None, "thing.done")


def test_a_refused_handler_leaves_no_consumer_behind() -> None:
    application = soma()
    with pytest.raises(ConfigurationError):
        application.handler("order.placed", consumer="billing")(one)
    assert application.consumers == ()


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 513, "é" * 257, 3, None, "relay:shop"])
def test_what_no_consumer_can_be_called(name: Any) -> None:
    with pytest.raises(SomaError):
        soma().handler("order.placed", consumer=name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reads": {"orders": "soma.shop.events"}},  # one text: it was read as a topic per letter
        {"reads": {"orders": []}},
        {"reads": {"orders": ["no topic!"]}},
        {"topics": {"order.placed": "no topic!"}},
        {"topics": {"Order Placed": "orders"}},
        {"settings": {"lanes": 3}},
        {"settings": 3},
        {"settings": {"": ConsumerSettings()}},
        {"settings": {"billing": ConsumerSettings(mirror=MirrorSettings())}},  # in standalone mode
        {"models": [OrderPlaced]},
        {"upcasters": {}},
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(SomaError):
        soma(**arguments)


def test_right_arguments_are_taken() -> None:
    soma(models=PayloadModels(OrderPlaced), reads={"orders": ("a.b", "c_d")}, topics={"order.placed": "o-1"})


def test_the_name_of_a_process_reaches_its_membership() -> None:
    """Static membership could not be had: nothing led from the settings of an application to it."""
    env = {
        "SOMA_DEPLOY_MODE": "k8s",
        "SOMASTACK_POSTGRES_DSN": "postgresql://127.0.0.1:1/d",
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "SOMA_INSTANCE": "shop-0",
    }
    for given, instance in ((env, "shop-0"), (env | {"SOMA_INSTANCE": ""}, None)):
        config = SomaConfig.from_env(given)
        pool = make_pool(config)
        source = Ground(config, pool, EventStore(pool, AppendSettings("shop")), AsyncExitStack()).source("a", ["t"])
        assert isinstance(source, KafkaSource)
        assert source.settings.instance == instance


def test_a_configuration_made_by_hand_is_whole() -> None:
    config = SomaConfig(mode="somastack", service_id="shop")  # type: ignore[arg-type]  # as people write it
    assert (config.mode, config.topic) == (DeployMode.SOMASTACK, "soma.shop.events")
    assert not SomaConfig(mode="standalone").uses_kafka  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="mode"):
        SomaConfig(mode="cloud")  # type: ignore[arg-type]
