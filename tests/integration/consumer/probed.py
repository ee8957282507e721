"""An application of its own process with consumers and probes, as a service runs them. Settings: the environment."""

from __future__ import annotations

import asyncio
import logging

from soma_common import Soma
from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.events.models import RecordedEvent

SETTINGS = ConsumerSettings(retry=RetryPolicy(tries=1, parked=RedrivePolicy(tries=0)))
soma = Soma.from_env(service_id="tests", settings=SETTINGS)


@soma.handler(EVERY_TYPE, consumer="billing")
async def bill(event: RecordedEvent, ctx: HandlerContext) -> None:
    if event.payload["n"] < 0:
        raise ValueError("a negative number")


@soma.handler(EVERY_TYPE, consumer='odd "name"\n')
async def look(event: RecordedEvent, ctx: HandlerContext) -> None:
    pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(soma.run())
