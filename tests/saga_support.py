"""What the tests of sagas share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.threads import connecting
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.views import LoggedEntry, SagaView
from soma_common.sagas.worker import SagaWorker
from tests.core_support import settings as append_settings
from tests.waiting import until

TENANT = "shop"
ENDS = (SagaStatus.COMPLETED, SagaStatus.COMPENSATED, SagaStatus.STUCK)


@dataclass(frozen=True)
class Sagas:
    """Sagas on one database."""

    pool: Pool
    events: EventStore
    orchestrator: SagaOrchestrator
    definitions: Sequence[Saga]

    def worker(self, *definitions: Saga, **settings: Any) -> SagaWorker:
        """A worker of these definitions, or all."""

        async def append(events: Any, tx: Any) -> Any:
            return await self.events.publish(events, tx=tx)

        return SagaWorker(
            self.pool, definitions or self.definitions, append=append, settings=SagaSettings(**settings),
            connect=connecting(self.pool.settings),
        )  # fmt: skip

    async def start(self, saga: Saga, given: Any, **more: Any) -> UUID:
        """Begin a saga."""
        return await self.orchestrator.start_saga(saga, given, tenant_id=TENANT, **more)

    async def ended(self, saga_id: UUID, *, within: float = 60.0) -> SagaView:
        """The saga, once it ended or is stuck."""

        async def look() -> SagaView | None:
            view = await self.orchestrator.get_saga(saga_id)
            return view if view.status in ENDS else None

        found: SagaView = await until(look, within=within, what=f"the end of {saga_id}")
        return found

    async def run(self, saga: Saga, given: Any, *, within: float = 60.0, **settings: Any) -> SagaView:
        """A saga, run by a worker of its own to its end."""
        async with self.worker(saga, **settings):
            return await self.ended(await self.start(saga, given), within=within)


@asynccontextmanager
async def opened(dsn: str, *definitions: Saga, size: int = 10) -> AsyncIterator[Sagas]:
    """Sagas on a pool of their own."""
    async with Pool(PoolSettings(dsn, size=size)) as pool:
        orchestrator = SagaOrchestrator(pool, definitions)
        try:
            yield Sagas(pool, EventStore(pool, append_settings()), orchestrator, definitions)
        finally:
            await orchestrator.close()


def told(journal: Sequence[LoggedEntry]) -> list[str]:
    """The journal in short: what happened, in order."""
    return [f"{entry.what} {entry.step}".strip() for entry in journal]


async def has_come_to(sagas: Sagas, saga_id: UUID, line: str) -> bool:
    """Whether this is in the journal in short."""
    return line in told((await sagas.orchestrator.get_saga(saga_id)).journal)


def undone(view: SagaView) -> list[str]:
    """The steps that were undone, in order."""
    return [entry.step for entry in view.journal if entry.what == "undone"]
