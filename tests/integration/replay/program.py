"""One process at one run, for tests that kill it. Its one argument is a JSON object.

``die``: {"stage": "handler" | "save" | "saved" | "committed", "after": n}: SIGKILL itself at that stage of its n-th
event or transaction.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.events.models import RecordedEvent
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import PoolSettings
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import Counts, Progress

EFFECT = "INSERT INTO effect (event_id, tenant, key, number, worker) VALUES ($1, $2, $3, $4, $5)"


async def main(given: dict[str, Any]) -> None:
    stage, left = given.get("die", {}).get("stage"), given.get("die", {}).get("after", 0)

    def reached(place: str) -> None:
        nonlocal left
        if place == stage:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    class Dying(Checkpoints):
        async def save(self, tx: Any, run: Progress, cursor: Cursor, counts: Counts) -> None:
            reached("save")
            await super().save(tx, run, cursor, counts)
            reached("saved")

    async def handle(event: RecordedEvent, ctx: HandlerContext) -> None:
        n = event.payload["n"]
        await ctx.tx.execute(EFFECT, event.event_id, event.tenant_id, str(event.stream), n, os.getpid())
        reached("handler")

    handlers = Handlers()
    handlers.add(handle, EVERY_TYPE)
    settings = ReplaySettings(batch=given.get("batch", 20), page=given.get("page", 50), lease=given.get("lease", 0.5))
    async with ReplayEngine(PoolSettings(given["dsn"]), "billing", handlers=handlers, settings=settings) as engine:
        engine._checkpoints = Dying(engine._pool, lease=settings.lease)
        async for _ in engine.run(given["run"]):
            reached("committed")
        print((await engine.progress(given["run"])).state, flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
