"""A consumer of the log that has missed events, and engines that replay them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from soma_common.consumer.handlers import EVERY_TYPE, Handle, Handlers
from soma_common.events.codec import JsonCodec
from soma_common.events.store import ALL_TENANTS
from soma_common.kafka.reader import ReaderSettings, TopicReader
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import Progress, ReplayFilter
from soma_common.sql.loader import blocks
from tests.integration.consumer.conftest import World, apply, open_world, topic
from tests.waiting import until

__all__ = ["topic"]  # the fixture of that module

PROGRAM = Path(__file__).with_name("program.py")
EVERYTHING = ReplayFilter(tenant_id=ALL_TENANTS)


class ReplayWorld(World):
    """One database, its live consumer ``billing``, and replays of it."""

    everything = EVERYTHING

    def program(self, arguments: dict[str, Any]) -> subprocess.Popen[str]:
        """A process of its own at one run: see program.py."""
        child = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        self.processes.append(child)
        return child

    async def passed_by(self, handle: Handle = apply, *types: str, consumer: str = "billing") -> None:
        """The live consumer has passed what is in the log, with this handler, and stopped."""
        worker = self.log_worker(handle, *types, consumer=consumer)
        async with worker:
            await self.pool.fetch("SELECT soma.tick('0')")
            tick = (await self.store.ticks.latest()).tick_id

            async def there() -> Any:
                return (await self.pool.fetch(blocks("readers")["passed"], f"consumer:{consumer}", tick))[0][0]

            await until(there, what="the live consumer at the end")

    async def forget(self, where: str = "true") -> int:
        """Take inbox rows and effects of some events away: as if the consumer had missed them."""
        gone = await self.pool.fetch(
            f"DELETE FROM soma.inbox i USING soma.events e WHERE e.event_id = i.event_id AND ({where}) RETURNING 1"
        )
        await self.pool.fetch(f"DELETE FROM effect x USING soma.events e WHERE e.event_id = x.event_id AND ({where})")
        return len(gone)

    def engine(
        self, handle: Handle = apply, *types: Any, consumer: str = "billing", bootstrap: str = "", **settings: Any
    ) -> ReplayEngine:
        handlers = Handlers()
        handlers.add(handle, *(types or (EVERY_TYPE,)))
        return ReplayEngine(
            self.pool.settings,
            consumer,
            handlers=handlers,
            append=lambda events, tx: self.store.publish(events, tx=tx),
            settings=ReplaySettings(**({"batch": 50, "page": 120} | settings)),
            topics=(lambda: TopicReader(ReaderSettings(bootstrap=bootstrap, wait=0.2), JsonCodec()))
            if bootstrap
            else None,
        )

    @staticmethod
    async def finish(engine: ReplayEngine, run: Progress, **given: Any) -> Progress:
        """Run to the end; the last progress."""
        last = run
        async for progress in engine.run(run.run_id, **given):
            last = progress
        return last


async def nothing(event: Any, ctx: Any) -> None:
    """A handler without an effect."""


@pytest.fixture
async def replays(soma_database: str) -> AsyncIterator[ReplayWorld]:
    async with open_world(soma_database) as made:
        world = ReplayWorld(made.pool, made.dsn)
        try:
            yield world
        finally:
            await world.close()
