"""A worker of sagas in a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from soma_common.events.append import AppendSettings
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.threads import connecting
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.worker import SagaWorker
from soma_common.service import run_until_signalled
from tests.torture import saga_mutants
from tests.torture.consumers import begin
from tests.torture.saga_bank import SAGAS, open_bank
from tests.torture.settings import SERVICE, Settings, dsn

AT_ONCE = 50  # sagas of a worker


def owner_of(folder: Path, name: str, life: int) -> Path:
    """Where a worker says under which name the database knows it."""
    return folder / f"{name}.{life}.owner"


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings = Settings.load(folder)
    saga_mutants.apply(settings.mutant)
    where = PoolSettings(dsn(folder), size=12)
    async with Pool(where) as pool, Pool(PoolSettings(dsn(folder), size=4)) as bank:
        open_bank(bank)
        events = EventStore(pool, AppendSettings(service_id=SERVICE))

        async def append(given: Any, tx: Any) -> Any:
            return await events.publish(given, tx=tx)

        worker = SagaWorker(
            pool, SAGAS, append=append, settings=SagaSettings(at_once=AT_ONCE, lease=settings.lease),
            connect=connecting(where),
        )  # fmt: skip
        owner_of(folder, name, life).write_text(str(worker._store.owner))
        await run_until_signalled(worker)


if __name__ == "__main__":
    asyncio.run(main(*begin()))
