"""Event types that a consumer refuses."""

from __future__ import annotations

from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.log.source import LogSettings, LogSource
from tests.waiting import until


async def test_a_refused_type_that_is_tried_again_without_a_handler_is_no_success(world: Any, apply: Any) -> None:
    """Its letter stays open until there is a handler: resolved, it would be lost."""
    events = await world.publish(2, keys=1, event_type="order.lost")

    def worker(*types: str) -> ConsumerWorker:
        handlers = Handlers()
        handlers.add(apply, *types)
        given = ConsumerSettings(unknown="refuse", redrive_every=0.05)
        source = LogSource(world.pool, "billing", LogSettings(most_idle=0.02))
        return ConsumerWorker(
            world.pool, "billing", source, handlers=handlers, settings=given,
            append=lambda new, tx: world.store.publish(new, tx=tx),
        )  # fmt: skip

    async with worker("order.paid") as refusing:
        await until(lambda: refusing.stats().tally.settled == 2)
        first = (await world.letters())[0].letter
        await world.dlq.retry_event(first.letter_id)
        await until(lambda: refusing.stats().tally.dead == 3 or refusing.stats().tally.redriven)
    assert (await world.letters())[0].letter.status == "dead"
    for letter in await world.letters():
        await world.dlq.retry_event(letter.letter.letter_id)
    async with worker(EVERY_TYPE) as taking:
        await until(lambda: taking.stats().tally.redriven == 2)
    await world.check(events)
