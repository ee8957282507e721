"""A worker dies at every point of every step, and at every pair of points."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import asyncpg
import pytest

from soma_common.errors import StepRefused
from soma_common.sagas.models import From, Saga, SagaContext, SagaStatus, SagaStep, Tx, with_compensation
from soma_common.testing.sagas import Crash, SagaTestKit
from tests.core_support import event
from tests.saga_support import TENANT


@dataclass
class Order:
    order_id: int
    refuse: bool = False


async def release(order: Order, tx: Tx) -> None:
    await tx.conn.execute("INSERT INTO effects VALUES ($1, 'release')", order.order_id)
    tx.publish(event(str(order.order_id), event_type="stock.released", tenant_id=TENANT))


@with_compensation(release)
async def reserve(order: Order, tx: Tx) -> str:
    await tx.conn.execute("INSERT INTO effects VALUES ($1, 'reserve')", order.order_id)
    tx.publish(event(str(order.order_id), event_type="stock.reserved", tenant_id=TENANT))
    return "reserved"


class Bank:
    """Something outside, which knows the keys it was called with."""

    def __init__(self) -> None:
        self.paid, self.refunded = Counter[str](), Counter[str]()

    async def refund(self, order: Order, ctx: SagaContext) -> None:
        self.refunded[ctx.key] += 1

    async def pay(self, order: Order, ctx: SagaContext) -> str:
        self.paid[ctx.key] += 1
        return "paid"

    def saga(self) -> Saga:
        return Saga(
            "four", Order, reserve, SagaStep(self.pay, self.refund), SagaStep(ship, pivot=True), confirm, deadline=3e5
        )


async def ship(order: Order, tx: Tx) -> str:
    if order.refuse:
        raise StepRefused("no truck")
    await tx.conn.execute("INSERT INTO effects VALUES ($1, 'ship')", order.order_id)
    return "shipped"


async def confirm(shipped: Annotated[str, From("ship")], order: Order, ctx: SagaContext) -> str:
    return shipped


@pytest.fixture
async def table(soma_database: str) -> str:
    """A table of effects."""
    connection = await asyncpg.connect(soma_database)
    await connection.execute("CREATE TABLE effects (order_id int, what text)")
    await connection.close()
    return soma_database


async def check(dsn: str, kit: SagaTestKit, bank: Bank, order: Order, *crashes: Crash) -> int:
    """One run; how many of the crashes happened."""
    bank.paid.clear(), bank.refunded.clear()
    run = await kit.run(kit.sagas[0], order, *crashes)
    connection = await asyncpg.connect(dsn)
    effects = Counter(
        row[0] for row in await connection.fetch("SELECT what FROM effects WHERE order_id = $1", order.order_id)
    )
    await connection.close()
    told = " and ".join(map(str, crashes))
    events = Counter(found.event_type for found in run.events)
    if order.refuse:
        assert run.status is SagaStatus.COMPENSATED, told
        assert run.undone == ["pay", "reserve"], told
        assert effects == {"reserve": 1, "release": 1}, told
        assert events == {"stock.reserved": 1, "stock.released": 1}, told
        assert set(bank.refunded) == {f"{run.saga.saga_id}:pay:undo"}, told
    else:
        assert run.status is SagaStatus.COMPLETED, told
        assert run.undone == [], told
        assert run.saga.result == "shipped", told
        assert effects == {"reserve": 1, "ship": 1}, told
        assert events == {"stock.reserved": 1}, told
        assert not bank.refunded, told
    assert set(bank.paid) == {f"{run.saga.saga_id}:pay"}, told
    again = sum(fault.step == "pay" and not fault.undo and fault.point != "after-commit" for fault in run.faults)
    assert bank.paid.total() <= 1 + again, told
    return len(run.faults)


@pytest.mark.parametrize("refuse", [False, True])
async def test_every_crash_point(table: str, *, refuse: bool) -> None:
    bank = Bank()
    async with SagaTestKit(table, bank.saga()) as kit:
        points = list(kit.crash_points(kit.sagas[0]))
        happened = [await check(table, kit, bank, Order(n, refuse), point) for n, point in enumerate(points)]
    assert len(points) == 5 + 4 + 5 + 4 + 5 + 4
    # Compensations are reached when the saga is refused, what follows the pivot when it is not.
    assert sum(happened) == (5 + 4 + 1 + 9 if refuse else 18)


@pytest.mark.parametrize("refuse", [False, True])
async def test_every_pair_of_crash_points(table: str, *, refuse: bool) -> None:
    bank = Bank()
    async with SagaTestKit(table, bank.saga()) as kit:
        points = list(kit.crash_points(kit.sagas[0]))
        reached = [p for n, p in enumerate(points) if await check(table, kit, bank, Order(n, refuse), p)]
        pairs = list(combinations(reached, 2))
        for n, pair in enumerate(pairs, len(points)):
            assert await check(table, kit, bank, Order(n, refuse), *pair) == 2
    assert len(pairs) == (171 if refuse else 153)
