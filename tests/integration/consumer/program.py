"""A consumer in a process of its own, for tests that kill it. Its one argument is a JSON object.

``die``: {"stage": "handler" | "batch" | "save" | "saved" | "stored", "after": n}: SIGKILL itself at that stage of its n-th
event, batch or write of positions. ``poison``: {"numbers": [n, …], "how": "exit" | "segv" | "kill"}: events that end
whatever process handles them. Prints ``ready`` when it begins, and its statistics when it ends by SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.consumer.session import Session
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Record
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.append import AppendSettings
from soma_common.events.codec import JsonCodec
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.kafka.source import KafkaSource, SourceSettings
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from soma_common.service import run_until_signalled

EFFECT = "INSERT INTO effect (event_id, tenant, key, number, worker) VALUES ($1, $2, $3, $4, $5)"
TOTAL = "INSERT INTO total (key, n) VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1"


class Death:
    """Kills this process when its stage is reached for the n-th time."""

    def __init__(self, stage: str = "", after: int = 0) -> None:
        self.stage, self.left = stage, after

    def reached(self, stage: str) -> None:
        if stage == self.stage:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """Adds to a source the places where a process may die; "stored" comes before Kafka is told anything."""

    death = Death()

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        self.death.reached("save")
        await super().save(tx, records)  # type: ignore[misc]  # a mixin
        self.death.reached("saved")

    async def saved(self, records: Sequence[Record]) -> None:
        self.death.reached("stored")
        await super().saved(records)  # type: ignore[misc]  # a mixin


class DyingLog(Dying, LogSource):
    """The log source, mortal."""


class DyingKafka(Dying, KafkaSource):
    """The Kafka source, mortal."""


def _meet(poison: dict[str, Any], number: int) -> None:
    """End this process if the event does that."""
    if number not in poison.get("numbers", ()):
        return
    if poison["how"] == "segv":
        ctypes.string_at(0)
    if poison["how"] == "kill":  # as the kernel does when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def _source(pool: Pool, given: dict[str, Any]) -> DyingLog | DyingKafka:
    if given["source"] == "log":
        lease, shards = given.get("lease", 10.0), given.get("shards", 8)
        return DyingLog(pool, given["consumer"], LogSettings(lease=lease, shards=shards, most_idle=0.05))
    settings = SourceSettings(
        bootstrap=given["bootstrap"],
        group=given["group"],
        topics=(given["topic"],),
        session=given.get("session", 6.0),
        instance=given.get("instance"),
        wait=0.05,
    )
    return DyingKafka(pool, settings, JsonCodec())


def _handlers(given: dict[str, Any], death: Death) -> Handlers:
    async def handle(event: RecordedEvent, ctx: HandlerContext) -> None:
        if event.event_type == "consumer.echo":
            return
        await ctx.tx.execute(
            EFFECT, event.event_id, event.tenant_id, str(event.stream), event.payload["n"], os.getpid()
        )
        death.reached("handler")
        _meet(given.get("poison", {}), event.payload["n"])
        await ctx.tx.execute(TOTAL, str(event.stream))
        if given.get("echo"):
            ctx.publish(
                Event(
                    payload={"n": event.payload["n"]},
                    event_type="consumer.echo",
                    tenant_id=event.tenant_id,
                    aggregate_id=f"echo-{event.aggregate_id}",
                )
            )
        if given.get("slow"):
            await asyncio.sleep(given["slow"])

    handlers = Handlers()
    handlers.add(handle, EVERY_TYPE)
    return handlers


async def main(given: dict[str, Any]) -> None:
    async with Pool(given["dsn"]) as pool:
        store = EventStore(pool, AppendSettings("tests"))
        source = _source(pool, given)
        source.death = Death(**given.get("die", {}))
        worker = ConsumerWorker(
            pool,
            given["consumer"],
            source,
            handlers=_handlers(given, source.death),
            append=lambda events, tx: store.publish(events, tx=tx),
            settings=ConsumerSettings(
                batch=given.get("batch", 50),
                lanes=given.get("lanes", 8),
                drain=5.0,
                timeout=given.get("idle", 30.0),
                idle_timeout=given.get("idle", 30.0),
                save_every=given.get("save_every", 0.1),
                **given.get("settings", {}),
            ),
        )
        settle = Session._settle

        def settled(session: Session, records: Iterable[Record]) -> None:
            source.death.reached("batch")
            settle(session, records)

        Session._settle = settled  # type: ignore[method-assign]  # right after the COMMIT of a batch
        print("ready", flush=True)
        await run_until_signalled(worker)
        print(json.dumps({"applied": worker.stats().tally.applied}), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.WARNING)
    asyncio.run(main(json.loads(sys.argv[1])))
