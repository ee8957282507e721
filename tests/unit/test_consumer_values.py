"""The consumer's values: registration of handlers, inherited fields, records of strangers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Record
from soma_common.consumer.worker import ConsumerWorker
from soma_common.errors import ConfigurationError, ValidationError
from soma_common.events.codec import JsonCodec
from soma_common.events.payloads import Payload
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.log.source import LogSettings, LogSource


class OrderPlaced(Payload, event_type="order.placed"):
    order_id: str


async def first(event: Any, ctx: HandlerContext) -> None: ...


async def second(event: Any, ctx: HandlerContext) -> None: ...


class Callable:
    async def __call__(self, event: Any, ctx: HandlerContext) -> None: ...


def plain(event: Any, ctx: HandlerContext) -> None: ...


def test_handlers_are_found_by_type_in_order() -> None:
    handlers = Handlers()
    handlers.add(second, EVERY_TYPE)
    handlers.add(first, OrderPlaced, "order.paid")
    handlers.add(Callable(), "order.paid")
    assert [h.handle for h in handlers.of("order.placed")] == [first, second]
    assert [h.model for h in handlers.of("order.placed")] == [OrderPlaced, None]
    assert len(handlers.of("order.paid")) == 3
    assert [h.handle for h in handlers.of("other.thing")] == [second]
    assert handlers.types == {"order.placed", "order.paid"}
    assert len(handlers) == 4


@pytest.mark.parametrize(
    ("handle", "types"),
    [("no function", ("order.paid",)), (first, ()), (first, ("order.paid", "order.paid")), (first, (Payload,))],
)
def test_wrong_registrations_are_refused(handle: Any, types: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError):
        Handlers().add(handle, *types)


def test_plain_and_async_functions_do_not_share_a_transaction() -> None:
    handlers = Handlers()
    handlers.add(plain, "order.paid")
    assert handlers.blocking
    with pytest.raises(ConfigurationError, match="consumer of its own"):
        handlers.add(first, "order.paid")


def test_a_wrong_type_name_is_refused() -> None:
    with pytest.raises(ValidationError):
        Handlers().add(first, "Not A Type")


def test_a_consumer_without_handlers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no handler"):
        ConsumerWorker(None, "x", None, handlers=Handlers(), append=None)  # type: ignore[arg-type]  # refused before


def _worker(source: Any, drain: float) -> ConsumerWorker:
    handlers = Handlers()
    handlers.add(first, EVERY_TYPE)
    settings = ConsumerSettings(drain=drain)
    return ConsumerWorker(None, "x", source, handlers=handlers, append=None, settings=settings)  # type: ignore[arg-type]  # never runs


def test_a_drain_ends_before_the_group_gives_the_partitions_to_others() -> None:
    """A member hears of a rebalance with its next heartbeat; thrown out in its drain, it would save nothing."""
    group = SourceSettings(bootstrap="h:1", group="g", topics=("t",), session=9.0, rebalance=20.0)
    source = KafkaSource(None, group, JsonCodec())  # type: ignore[arg-type]  # nothing is read
    _worker(source, 16.9)
    for drain in (17.0, 60.0):
        with pytest.raises(
            ConfigurationError, match=r"ConsumerSettings\.drain=.*SourceSettings\.rebalance=20"
        ) as caught:
            _worker(source, drain)
        assert caught.value.cure == "lower drain below 17, or raise rebalance."


def test_a_drain_of_the_log_may_take_as_long_as_it_likes() -> None:
    _worker(LogSource(None, "x"), 3600.0)  # type: ignore[arg-type]  # nothing is read


@pytest.mark.parametrize("batch", [0, 10_001])
def test_batch_sizes_have_bounds(batch: int) -> None:
    with pytest.raises(ConfigurationError):
        ConsumerSettings(batch=batch)


@given(st.integers())
def test_shards_are_powers_of_two(shards: int) -> None:
    if shards in {2**n for n in range(11)}:
        assert LogSettings(shards=shards).shards == shards
    else:
        with pytest.raises(ConfigurationError):
            LogSettings(shards=shards)


def test_a_record_is_a_value() -> None:
    record = Record(Partition("t", 3), 7, 1, 8, None)
    assert str(record.partition) == "t[3]"
    assert record == Record(Partition("t", 3), 7, 1, 8, None)
