"""A consumer process: every event leaves one row, in a table that would take a second one without complaint."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.codec import JsonCodec
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.kafka.source import KafkaSource, SourceSettings
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from soma_common.service import run_until_signalled
from tests.torture import mutants
from tests.torture.children import die_with_parent
from tests.torture.settings import CONSUMER, FOLLOW_UP, TOPIC, Settings, append_settings, dsn

SESSION = 6.0  # seconds, the least that the broker takes
_EFFECT = """
WITH found AS (SELECT version FROM applied WHERE key = $2),
moved AS (INSERT INTO applied VALUES ($2, $3) ON CONFLICT (key) DO UPDATE SET version = excluded.version)
INSERT INTO effects (event_id, key, version, previous, applied_by)
SELECT $1, $2, $3, coalesce((SELECT version FROM found), 0), $4
"""


def handler(name: str, folder: Path) -> Handlers:
    """One effect per event, and for some a follow-up event."""

    async def apply(event: RecordedEvent, context: HandlerContext) -> None:
        await context.tx.execute(_EFFECT, event.event_id, str(event.stream), event.version, name)
        mutants.reached(folder, mutants.DIE_IN_HANDLER)
        if event.payload.get("follow"):
            context.publish(
                Event(
                    payload={"answers": str(event.event_id)},
                    tenant_id=event.tenant_id,
                    aggregate_type="answer",
                    aggregate_id=event.aggregate_id,
                    event_type=FOLLOW_UP,
                )
            )

    handlers = Handlers()
    handlers.add(apply, EVERY_TYPE)
    return handlers


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings = Settings.load(folder)
    mutants.apply(settings.mutant, folder)
    kafka = SourceSettings(
        bootstrap=settings.bootstrap, group="soma.torture", topics=(TOPIC,), session=SESSION, rebalance=8.0
    )
    working = ConsumerSettings(
        batch=100, drain=3.0, idle_timeout=4.0, timeout=4.0, backoff=Backoff(base=0.05, maximum=1.0)
    )
    async with Pool(PoolSettings(dsn(folder), size=3)) as pool:
        store = EventStore(pool, append_settings(settings))

        async def append(events: Sequence[Event], tx: Any) -> None:
            await store.publish(events, tx=tx)

        worker = ConsumerWorker(
            pool,
            CONSUMER,
            KafkaSource(pool, kafka, JsonCodec()),
            handlers=handler(f"{name}.{life}", folder),
            append=append,
            settings=working,
        )
        await run_until_signalled(worker)


if __name__ == "__main__":
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
