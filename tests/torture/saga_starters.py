"""A process that starts sagas in batches: alone, in transactions that commit or do not, some twice; and sends signals."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from soma_common.errors import InfrastructureError, SagaKeyReused, TransactionConflict, WrongSagaState
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.starting import begin as beginning
from tests.torture.children import until_terminated
from tests.torture.consumers import begin
from tests.torture.journal import Journal, now
from tests.torture.saga_bank import SAGAS, definition
from tests.torture.saga_plans import TENANT, Plan, coins, draw
from tests.torture.settings import Settings, dsn

log = logging.getLogger(__name__)
PACE = 0.25  # seconds between two batches
LIFE = 1_000_000  # numbers of sagas that one life of a process may use


def journal_of(folder: Path, name: str, life: int) -> Path:
    """What the process did: ``try`` before a batch, ``ok`` with its ids, ``no`` for what was rolled back."""
    return folder / f"{name}.{life}.starter.jsonl"


class _Undone(Exception):
    """Rolls a transaction back."""


class Starter:
    """Starts sagas of numbers of its own."""

    def __init__(self, folder: Path, name: str, life: int, pool: Pool) -> None:
        self._settings = Settings.load(folder)
        self._seed = self._settings.seed
        self._chance = random.Random(f"{self._seed}:{name}:{life}")
        self._journal = Journal(journal_of(folder, name, life))
        self._pool, self._sagas = pool, SagaOrchestrator(pool, SAGAS)
        self._next = life * LIFE
        self._before: Sequence[Plan] = ()
        self._signals: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """For ever, at the rate of the run."""
        loop, owed = asyncio.get_running_loop(), 0.0
        last = loop.time()
        while True:
            await asyncio.sleep(PACE)
            owed, last = min(owed + (loop.time() - last) * self._settings.rate, 5 * self._settings.rate), loop.time()
            count = int(owed)
            if count:
                owed -= count
                await self._batch([draw(self._seed, self._number()) for _ in range(count)])

    def _number(self) -> int:
        self._next += 1
        return self._next

    async def _batch(self, plans: Sequence[Plan]) -> None:
        how = self._chance.choices(("alone", "tx", "again"), (70, 15, 15))[0]
        if self._chance.random() < 0.15:
            await self._rolled_back([draw(self._seed, self._number()) for _ in range(3)])
        if how == "again":  # those of before once more, too
            plans = [*self._before, *plans]
        await self._start(plans, inside=how == "tx")
        self._before = plans[-4:]
        if self._chance.random() < 0.05:
            await self._reuse(plans[0])

    async def _start(self, plans: Sequence[Plan], *, inside: bool) -> None:
        """Until it is known that they were started: the same keys again and again are no danger."""
        numbers = [plan.job.number for plan in plans]
        self._journal.write({"s": "try", "n": numbers, "t": now()})
        while True:
            try:
                ids = await self._once(plans, inside=inside)
                break
            except (InfrastructureError, TransactionConflict) as error:
                log.info("%s", error)
                await asyncio.sleep(0.2)
        told: Mapping[int, UUID] = dict(zip(numbers, ids, strict=True))
        self._journal.write({"s": "ok", "i": {str(n): str(each) for n, each in told.items()}, "t": now()})
        for plan in plans:
            if plan.name == "coins" and plan not in self._before:
                self._later(plan, told[plan.job.number])

    async def _once(self, plans: Sequence[Plan], *, inside: bool) -> list[UUID]:
        starts = [
            beginning(definition(plan), plan.job, tenant_id=TENANT, saga_key=plan.key, priority=1 + plan.job.number % 5)
            for plan in plans
        ]
        if not inside:
            return await self._sagas.start_sagas(starts)
        async with self._pool.transaction() as tx:
            return await self._sagas.start_sagas(starts, tx=tx)

    async def _rolled_back(self, plans: Sequence[Plan]) -> None:
        self._journal.write({"s": "no", "n": [plan.job.number for plan in plans], "t": now()})
        try:
            async with self._pool.transaction() as tx:
                starts = [beginning(definition(p), p.job, tenant_id=TENANT, saga_key=p.key) for p in plans]
                await self._sagas.start_sagas(starts, tx=tx)
                raise _Undone
        except (_Undone, InfrastructureError, TransactionConflict):
            pass

    async def _reuse(self, plan: Plan) -> None:
        """The same key with another input is refused."""
        other = draw(self._seed, plan.job.number).job
        other.cents += 1
        try:
            await self._sagas.start_saga(definition(plan), other, tenant_id=TENANT, saga_key=plan.key)
        except (SagaKeyReused, InfrastructureError, TransactionConflict) as error:
            log.info("%s", error)
        else:
            self._journal.write({"s": "wrong", "n": plan.job.number, "t": now()})

    # Signals.

    def _later(self, plan: Plan, saga_id: UUID) -> None:
        task = asyncio.create_task(self._send(plan, saga_id))
        self._signals.add(task)
        task.add_done_callback(self._signals.discard)

    async def _send(self, plan: Plan, saga_id: UUID) -> None:
        """At once, twice, or late."""
        for coin in coins(plan.job):
            await asyncio.sleep(self._chance.choice((0.0, 0.1, 1.0, 3.0)))
            for _ in range(self._chance.choice((1, 1, 2))):
                await self._signal(saga_id, coin)

    async def _signal(self, saga_id: UUID, coin: int) -> None:
        while True:
            try:
                fresh = await self._sagas.signal(saga_id, "coin", coin, signal_id=f"coin-{coin}", who="starter")
            except WrongSagaState as error:
                log.info("%s", error)
                return
            except InfrastructureError as error:
                log.info("%s", error)
                await asyncio.sleep(0.2)
            else:
                self._journal.write({"s": "signal", "g": str(saga_id), "c": coin, "fresh": fresh, "t": now()})
                return

    async def finish(self) -> None:
        """What was promised to be sent."""
        await asyncio.gather(*self._signals, return_exceptions=True)


async def main(folder: Path, name: str, life: int) -> None:
    """The process; asked to end, it sends the signals that are due first."""
    async with Pool(PoolSettings(dsn(folder), size=6)) as pool:
        starter = Starter(folder, name, life, pool)
        try:
            await starter.run()
        finally:
            await starter.finish()


def read_numbers(lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """All numbers that were tried, whatever became of them."""
    return {number for line in lines if line["s"] == "try" for number in line["n"]}


if __name__ == "__main__":
    asyncio.run(until_terminated(main(*begin())))
