"""A consumer process: every event leaves one row, in a table that would take a second one without complaint.

Some events are born with a fate: ``flaky`` ones fail now and then, ``broken`` ones until somebody mends their letter, and
``poison`` ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Source
from soma_common.consumer.worker import ConsumerWorker
from soma_common.dlq.models import RedrivePolicy
from soma_common.events.codec import JsonCodec
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from soma_common.service import run_until_signalled
from tests.torture import mutants
from tests.torture.children import POISONED, die_with_parent
from tests.torture.settings import CONSUMER, FOLLOW_UP, TOPIC, Settings, append_settings, dsn

SESSION = 6.0  # seconds, the least that the broker takes
_EFFECT = """
WITH found AS (SELECT version FROM applied WHERE consumer = $5 AND key = $2),
moved AS (
    INSERT INTO applied VALUES ($5, $2, $3) ON CONFLICT (consumer, key) DO UPDATE SET version = excluded.version
)
INSERT INTO effects (event_id, key, version, previous, applied_by, consumer)
SELECT $1, $2, $3, coalesce((SELECT version FROM found), 0), $4, $5
"""
WORKING = ConsumerSettings(
    lanes=6, batch=50, ahead=300, drain=3.0, idle_timeout=4.0, timeout=4.0,
    backoff=Backoff(base=0.05, maximum=1.0), redrive_every=0.2,
    retry=RetryPolicy(tries=3, backoff=Backoff(base=0.1, maximum=0.5), parked=RedrivePolicy(after=0.5, tries=2)),
)  # fmt: skip


class FateError(Exception):
    """What an event with a fate fails with."""


def handlers_of(consumer: str, name: str, folder: Path) -> Handlers:
    """One effect per event, and for some a follow-up event."""

    async def apply(event: RecordedEvent, context: HandlerContext) -> None:
        key = str(event.stream)
        await context.tx.execute(_EFFECT, event.event_id, key, event.version, name, consumer)
        mutants.reached(folder, mutants.DIE_IN_HANDLER)
        _meet(event.payload.get("fate"))
        if event.payload.get("follow") and consumer == CONSUMER:
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


def _meet(fate: str | None) -> None:
    if fate == "poison":
        os._exit(POISONED)
    if fate == "broken" or (fate == "flaky" and random.random() < 0.6):
        raise FateError(fate)


def appending(store: EventStore) -> Any:
    """What handlers publish goes to the log."""

    async def append(events: Sequence[Event], tx: Any) -> None:
        await store.publish(events, tx=tx)

    return append


async def consume(folder: Path, consumer: str, name: str, source: Source, pool: Pool, settings: Settings) -> None:
    """Work until SIGTERM."""
    store = EventStore(pool, append_settings(settings))
    handlers = handlers_of(consumer, name, folder)
    worker = ConsumerWorker(
        pool, consumer, source, handlers=handlers, append=appending(store), settings=WORKING
    )  # fmt: skip
    await run_until_signalled(worker)


async def main(folder: Path, name: str, life: int) -> None:
    """The process. Every second one is a static member: its partitions wait for it while it is started again."""
    settings = Settings.load(folder)
    mutants.apply(settings.mutant, folder)
    instance = name if name.endswith("1") else None
    kafka = SourceSettings(
        bootstrap=settings.bootstrap, group="soma.torture", topics=(TOPIC,), session=SESSION, rebalance=8.0,
        instance=instance,
    )  # fmt: skip
    async with Pool(PoolSettings(dsn(folder), size=9)) as pool:
        source = KafkaSource(pool, kafka, JsonCodec())
        await consume(folder, CONSUMER, f"{name}.{life}", source, pool, settings)


def begin() -> tuple[Path, str, int]:
    """What a child of a run is told; called first in its process."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


if __name__ == "__main__":
    asyncio.run(main(*begin()))
