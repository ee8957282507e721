"""Services of choreographies that are killed: between effect and commit, and after it."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

from soma_common.sagas.models import SagaStatus
from soma_common.sagas.views import SagaView
from tests.integration.sagas.shop import MODELS, TABLE, OrderPlaced, OrderRejected, Running, event, standalone, whole
from tests.integration.sagas.shop_process import process
from tests.saga_support import told
from tests.waiting import until


class Watching(Running):
    """An application that publishes and looks, and runs nothing."""

    async def __aenter__(self) -> Watching:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.soma)
            await self.soma.pool.fetch(TABLE)
            self._closing = stack.pop_all()
        return self

    async def dead(self) -> int:
        """How often a step ended its process."""
        return len(await self.done("deaths"))


def opened(dsn: str) -> Watching:
    return Watching(standalone(dsn), whole(), models=MODELS)


@pytest.mark.parametrize("how", ["die", "die-undo"])
async def test_killed_between_effect_and_commit(soma_database: str, how: str) -> None:
    async with opened(soma_database) as shop:
        await shop.publish(event(OrderPlaced(order_id="1", how=how)))
        if how == "die-undo":
            await shop.publish(event(OrderRejected(order_id="1"), aggregate_type="order.placed"))  # behind it
        with process(soma_database) as first:
            await until(lambda: first.poll() is not None, what="its death")
            assert await shop.dead() == 1
        with process(soma_database):
            status = SagaStatus.COMPLETED if how == "die" else SagaStatus.COMPENSATED
            view = await shop.stands(status)
        done = await shop.done()
        assert len(done) == len(set(done))
        assert done[:2] == ["note 1", "reserve 1"]
        assert len(set(told(view.journal))) == view.length


async def test_killed_again_and_again(soma_database: str) -> None:
    """Whenever something was committed: what follows it in the log is applied by the next process, once."""
    chance, count = random.Random(7), 24
    async with opened(soma_database) as shop:
        for n in range(count):
            how = "refuse" if n % 4 == 0 else ""
            await shop.publish(event(OrderPlaced(order_id=f"{n}", how=how), f"c-{n}"))
            if n % 4 == 1:
                await shop.publish(event(OrderRejected(order_id=f"{n}"), f"c-{n}"))
        wanted = {f"c-{n}": SagaStatus.COMPENSATED if n % 4 < 2 else SagaStatus.COMPLETED for n in range(count)}
        for _ in range(3):
            enough = await _written(shop) + chance.randrange(1, 40)
            with process(soma_database) as running:
                await until(partial(_more, shop, enough, wanted))
                running.kill()
        with process(soma_database):
            views = {c: await shop.stands(status, correlation=c) for c, status in wanted.items()}
        for correlation, view in views.items():
            _check(view, await shop.done(correlation))


async def _written(shop: Running) -> int:
    return int((await shop.soma.pool.fetch("SELECT count(*) FROM soma.saga_steps"))[0][0])


async def _more(shop: Running, count: int, wanted: dict[str, SagaStatus]) -> Any:
    """So many entries are written; or all have ended, and no more will be."""
    rows = await shop.soma.pool.fetch("SELECT correlation_id, status FROM soma.sagas")
    return await _written(shop) >= count or {row[0]: SagaStatus(row[1]) for row in rows} == wanted


def _check(view: SagaView, done: list[str]) -> None:
    lines = Counter(told(view.journal))
    assert set(lines.values()) == {1}
    assert len(done) == len(set(done))
    effects = {line.split()[0] for line in done}
    assert ("release" in effects) == (view.status is SagaStatus.COMPENSATED and "reserve" in effects)
    assert ("forget" in effects) == (view.status is SagaStatus.COMPENSATED and "note" in effects)
    assert {line.removeprefix("done shop/") for line in lines if line.startswith("done")} == effects & {
        "note", "reserve", "confirm"
    }  # fmt: skip
