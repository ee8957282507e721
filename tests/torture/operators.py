"""A process that cares for dead letters as people do: mends some, tries some again as they are, twice at once now and then."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path
from typing import Any

import orjson

from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import FullLetter
from soma_common.errors import InfrastructureError, LetterChanged, LetterNotFound, TransactionConflict
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.pool import Pool, PoolSettings
from tests.torture.children import until_terminated
from tests.torture.consumers import begin
from tests.torture.settings import Settings, dsn

log = logging.getLogger(__name__)


def mended(letter: FullLetter) -> Any:
    """The event without its fate."""
    value = orjson.loads(letter.value or b"{}")
    value["payload"] = {name: what for name, what in value["payload"].items() if name != "fate"}
    return value


async def care(queue: DLQHandler, chance: random.Random) -> None:
    """One round over what is dead."""
    if chance.random() < 0.1:
        await queue.retry_many(tenant_id=ALL_TENANTS, statuses="dead", why="all of them, as they are")
    page = await queue.list_dlq_events(tenant_id=ALL_TENANTS, statuses="dead", limit=50)
    for letter in page.letters:
        try:
            if chance.random() < 0.2:
                await queue.retry_event(letter.letter_id, why="as it is")
            else:
                await queue.retry_event(letter.letter_id, transform=mended, why="mended")
        except (LetterChanged, LetterNotFound) as error:
            log.info("somebody else was faster: %s", error)


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings = Settings.load(folder)
    chance = random.Random(f"{settings.seed}:{name}:{life}")
    async with Pool(PoolSettings(dsn(folder), size=2)) as pool:
        queue = DLQHandler(pool, who=f"{name}.{life}")
        while True:
            try:
                await care(queue, chance)
            except (InfrastructureError, TransactionConflict) as error:
                log.info("%s", error)
            await asyncio.sleep(0.3)


if __name__ == "__main__":
    asyncio.run(until_terminated(main(*begin())))
