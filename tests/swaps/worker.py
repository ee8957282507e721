"""A live worker in a process of its own. Its one argument is a JSON object: ``dsn``, ``fail_every``."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.dlq.models import RedrivePolicy
from soma_common.events.append import AppendSettings
from soma_common.events.store import EventStore
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from soma_common.service import run_until_signalled
from tests.swaps.projection import CONSUMER, handlers


async def main(given: dict[str, Any]) -> None:
    """Consume until SIGTERM."""
    retry = RetryPolicy(tries=1, parked=RedrivePolicy(after=0.5, tries=5, factor=1.0))
    async with Pool(given["dsn"]) as pool:
        store = EventStore(pool, AppendSettings("swaps"))
        worker = ConsumerWorker(
            pool,
            CONSUMER,
            LogSource(pool, CONSUMER, LogSettings(lease=2.0, most_idle=0.05)),
            handlers=handlers(given["fail_every"]),
            append=lambda events, tx: store.publish(events, tx=tx),
            settings=ConsumerSettings(retry=retry, redrive_every=0.2, lanes=given["lanes"]),
        )
        print("ready", flush=True)
        await run_until_signalled(worker)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
