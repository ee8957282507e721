"""A consumer in a process of its own, for tests that kill it. Its one argument is a JSON object.

``die``: {"stage": "handler" | "batch" | "save" | "saved" | "stored", "after": n}: SIGKILL itself at that stage of its n-th
event, batch or write of positions. ``poison``: {"numbers": [n, …], "how": "exit" | "segv" | "kill"}: events that end
whatever process handles them. ``handlers``: "psycopg" or "django" for a handler that is a plain function; with ``hang``
it hangs at that number. Prints ``ready`` when it begins, and its statistics when it ends by SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, Handle, HandlerContext, Handlers, SyncHandlerContext
from soma_common.consumer.session import Session
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Record
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.append import AppendSettings
from soma_common.events.codec import JsonCodec
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from soma_common.postgres.threads import Connect
from soma_common.service import run_until_signalled
from tests.integration.consumer.flavours import EFFECT as PLAIN_EFFECT
from tests.integration.consumer.flavours import execute, flavour_of

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
    handlers.add(_plain(given, death) if given.get("handlers") else handle, EVERY_TYPE)
    return handlers


def _plain(given: dict[str, Any], death: Death) -> Handle:
    """The same as a plain function."""

    def handle(event: RecordedEvent, ctx: SyncHandlerContext) -> None:
        if event.event_type == "consumer.echo":
            return
        number, key = event.payload["n"], str(event.stream)
        execute(ctx.tx, PLAIN_EFFECT, (event.event_id, event.tenant_id, key, number, os.getpid()))
        death.reached("handler")
        execute(ctx.tx, TOTAL.replace("$1", "%s"), (key,))
        if given.get("echo"):
            echo = {"event_type": "consumer.echo", "tenant_id": event.tenant_id}
            ctx.publish(Event(payload={"n": number}, aggregate_id=f"echo-{event.aggregate_id}", **echo))
        if number == given.get("hang"):
            print("hangs", flush=True)
            threading.Event().wait()
        time.sleep(given.get("slow", 0.0))

    return handle


def _connect(given: dict[str, Any], closing: ExitStack) -> Connect | None:
    if not given.get("handlers"):
        return None
    return closing.enter_context(flavour_of(given["handlers"], given["dsn"])).connect


async def main(given: dict[str, Any]) -> None:
    with ExitStack() as closing:
        await consume(given, _connect(given, closing))


async def consume(given: dict[str, Any], connect: Connect | None) -> None:
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
            connect=connect,
            settings=ConsumerSettings(
                batch=given.get("batch", 50),
                lanes=given.get("lanes", 8),
                drain=given.get("drain", 5.0),
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
