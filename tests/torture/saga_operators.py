"""A process that does to sagas what people do: turns some around, and cares for those that are stuck."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from pathlib import Path
from uuid import UUID

from soma_common.dlq.handler import DLQHandler
from soma_common.errors import (
    DeadLetterError,
    InfrastructureError,
    SagaNotFound,
    TransactionConflict,
    ValidationError,
    WrongSagaState,
)
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.orchestrator import SagaOrchestrator
from tests.torture.children import until_terminated
from tests.torture.consumers import begin
from tests.torture.journal import Journal, now
from tests.torture.saga_bank import SAGAS
from tests.torture.saga_plans import TENANT
from tests.torture.settings import Settings, dsn

log = logging.getLogger(__name__)
_MEND = "INSERT INTO mended (saga_id) VALUES ($1) ON CONFLICT DO NOTHING"
_REFUSED = (WrongSagaState, SagaNotFound, ValidationError, DeadLetterError)
TURNS = ("compensate", "cancel")
CARES = ("retry", "mend", "letter", "skip", "done", "failed")


def journal_of(folder: Path, name: str, life: int) -> Path:
    """What the process asked for: ``try`` before, and ``ok``, ``asked`` (before, by others) or ``no`` (refused) after."""
    return folder / f"{name}.{life}.operator.jsonl"


def is_left(saga_id: UUID) -> bool:
    """Whether nobody cares for it: some sagas are stuck to the end."""
    return hashlib.sha256(saga_id.bytes).digest()[0] < 100


class Operator:
    """Works with a reason of its own for every act, so that the journals can be compared."""

    def __init__(self, folder: Path, name: str, life: int, pool: Pool) -> None:
        self._name, self._journal = f"{name}.{life}", Journal(journal_of(folder, name, life))
        self._chance = random.Random(f"{Settings.load(folder).seed}:{name}:{life}")
        self._pool, self._sagas = pool, SagaOrchestrator(pool, SAGAS)
        self._letters = DLQHandler(pool, who=self._name)
        self._acts = 0

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._chance.uniform(0.2, 0.8))
            try:
                await self._round()
            except (InfrastructureError, TransactionConflict) as error:
                log.info("%s", error)

    async def _round(self) -> None:
        where = self._chance.choice(("running", ["pending", "running"]))
        page = await self._sagas.list(tenant_id=TENANT, statuses=where, limit=40)
        if page.sagas:
            await self._act(self._chance.choice(page.sagas).saga_id, self._chance.choice(TURNS))
        page = await self._sagas.list(tenant_id=TENANT, statuses="stuck", limit=1000)
        stuck = [each.saga_id for each in page.sagas if not is_left(each.saga_id)]
        for saga_id in self._chance.sample(stuck, min(3, len(stuck))):
            await self._act(saga_id, self._chance.choices(CARES, (1, 3, 2, 2, 2, 1))[0])

    async def _act(self, saga_id: UUID, verb: str) -> None:
        self._acts += 1
        why = f"{self._name}:{self._acts}"
        line = {"v": verb, "g": str(saga_id), "w": why}
        self._journal.write({**line, "s": "try", "t": now()})
        try:
            asked = await self._do(saga_id, verb, why)
        except _REFUSED as error:
            log.info("%s", error)
            self._journal.write({**line, "s": "no", "t": now()})
        else:
            self._journal.write({**line, "s": "ok" if asked else "asked", "t": now()})

    async def _do(self, saga_id: UUID, verb: str, why: str) -> bool:
        sagas, who = self._sagas, self._name
        match verb:
            case "compensate":
                return await sagas.compensate(saga_id, reason=why, who=who)
            case "cancel":
                return await sagas.cancel(saga_id, reason=why, who=who)
            case "skip":
                await sagas.skip(saga_id, why=why, who=who)
            case "done":
                await sagas.resolve(saga_id, happened=True, result=0, why=why, who=who)
            case "failed":
                await sagas.resolve(saga_id, happened=False, why=why, who=who)
            case "letter":
                return await self._letter(saga_id, why)
            case _:
                if verb == "mend":
                    await self._pool.fetch(_MEND, saga_id)
                await sagas.retry(saga_id, why=why, who=who)
        return True

    async def _letter(self, saga_id: UUID, why: str) -> bool:
        await self._pool.fetch(_MEND, saga_id)
        page = await self._letters.list_dlq_events(tenant_id=TENANT, event_id=saga_id, statuses="dead", limit=10)
        for letter in page.letters:
            return await self._letters.retry_event(letter.letter_id, why=why)
        raise WrongSagaState(f"Saga {saga_id} has no letter any more.")


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    async with Pool(PoolSettings(dsn(folder), size=2)) as pool:
        await Operator(folder, name, life, pool).run()


if __name__ == "__main__":
    asyncio.run(until_terminated(main(*begin())))
