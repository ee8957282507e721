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
from soma_common.events.payloads import Payload
from soma_common.log.source import LogSettings


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
