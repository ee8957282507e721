"""Log lines of a handler have the ids of its event, whatever kind of handler it is; lines around it have none."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from soma_common.ambient import told_in_logs
from soma_common.consumer.handlers import BatchContext
from soma_common.logging.formatters import SomaStackJSONFormatter
from tests.integration.consumer.flavours import apply as apply_in_thread
from tests.log_support import parsed
from tests.waiting import until

log = logging.getLogger("tests.log_ids")


@pytest.fixture
def lines() -> Any:
    """What was logged, as JSON."""
    found: list[dict[str, Any]] = []
    formatter = SomaStackJSONFormatter(service="shop")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(parsed(formatter.format(record)))

    handler = Keep()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)


def check(lines: list[dict[str, Any]], events: list[Any]) -> None:
    known = {str(event.event_id): event for event in events}
    assert len(lines) >= len(known)
    for line in lines:
        event = known[line["data"]["event_id"]]
        assert line["correlation_id"] == event.correlation_id
        assert line["tenant_id"] == event.tenant_id
        assert line["trace_id"] == event.trace_id


async def test_handlers_of_one_event(world: Any, apply: Any, lines: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        log.info("handled", extra={"event_id": event.event_id})
        await apply(event, ctx)

    events = await world.publish(60, keys=6)
    async with world.log_worker(handle):
        await world.applied(60)
    check(lines, events)


async def test_handlers_that_are_plain_functions(world: Any, lines: Any, flavour: Any) -> None:
    def handle(event: Any, ctx: Any) -> None:
        log.info("handled", extra={"event_id": event.event_id})
        apply_in_thread(event, ctx)

    events = await world.publish(60, keys=6)
    async with world.log_worker(handle, connect=flavour.connect):
        await world.applied(60)
    check(lines, events)


async def test_handlers_of_many_events_have_no_ids_unless_it_is_one(world: Any, lines: Any) -> None:
    sizes: list[int] = []

    async def handle(events: Any, ctx: BatchContext) -> None:
        sizes.append(len(events))
        log.info("handled", extra={"size": len(events)})

    await world.publish(100)
    async with world.log_worker(handle, batch=True) as worker:
        await until(lambda: worker.stats().tally.applied == 100)
    assert sizes == [line["data"]["size"] for line in lines]
    for line in lines:
        assert (line["correlation_id"] is None) == (line["data"]["size"] > 1)
    assert told_in_logs() is None
