"""One process at one run, for tests that kill it. Its one argument is a JSON object.

``die``: {"stage": "handler" | "save" | "saved" | "committed", "after": n}: SIGKILL itself at that stage of its n-th
event or transaction. Of a rebuild also at "check" and "adopted" (in the transaction of the swap, before and after the
tables have changed places), "swapped" (it has committed), and "dropped" (a schema of what is left over is gone).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.events.codec import JsonCodec
from soma_common.events.models import RecordedEvent
from soma_common.kafka.reader import ReaderSettings, TopicReader
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import PoolSettings, fetch
from soma_common.replay import swapping
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import Counts, Progress
from soma_common.replay.projection import Shadow
from soma_common.replay.rebuilding import RebuildSettings
from soma_common.replay.swapping import Swap

TOTAL = "INSERT INTO total (key, n) VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1"
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

    rebuild = given.get("rebuild", False)

    async def handle(event: RecordedEvent, ctx: HandlerContext) -> None:
        n = event.payload["n"]
        await ctx.tx.execute(EFFECT, event.event_id, event.tenant_id, str(event.stream), n, os.getpid())
        if rebuild:
            await ctx.tx.execute(TOTAL, str(event.stream))
        reached("handler")

    def dying(call: Callable[..., Awaitable[Any]], stage: str) -> Callable[..., Awaitable[Any]]:
        async def called(*arguments: Any) -> Any:
            result = await call(*arguments)
            reached(stage)
            return result

        return called

    async def fetching(tx: Any, sql: str, args: Any) -> Any:
        rows = await fetch(tx, sql, args)
        if "adopt_inbox" in sql:
            reached("adopted")
        return rows

    Shadow.check = dying(Shadow.check, "check")  # type: ignore[method-assign]
    Shadow._drop = dying(Shadow._drop, "dropped")  # type: ignore[method-assign]
    Swap.attempt = dying(Swap.attempt, "swapped")  # type: ignore[method-assign]
    swapping.fetch = fetching  # type: ignore[assignment]

    handlers = Handlers()
    handlers.add(handle, EVERY_TYPE)
    settings = ReplaySettings(
        batch=given.get("batch", 20),
        page=given.get("page", 50),
        lease=given.get("lease", 0.5),
        rebuild=RebuildSettings(page=given.get("page", 50), lanes=3),
    )
    reader = ReaderSettings(bootstrap=given.get("bootstrap", ""), wait=0.2)
    async with ReplayEngine(
        PoolSettings(given["dsn"]), "billing", handlers=handlers, settings=settings,
        topics=lambda: TopicReader(reader, JsonCodec()),
    ) as engine:  # fmt: skip
        engine._checkpoints = Dying(engine._pool, lease=settings.lease)
        async for _ in engine.run(given["run"]):
            reached("committed")
        print((await engine.progress(given["run"])).state, flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
