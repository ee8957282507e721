"""A ``tx`` in wrong hands: another task, another thread, after its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import pytest

from soma_common.errors import TransactionElsewhere, TransactionEnded
from soma_common.events.store import EventStore
from soma_common.transactions import TransactionScope
from soma_common.tx import Tx
from tests.core_support import event, opened

USES: list[Callable[[Tx], object]] = [lambda tx: tx.conn, lambda tx: tx.publish(event("x"))]


@pytest.fixture
async def store(soma_database: str) -> AsyncIterator[EventStore]:
    async with opened(soma_database) as store:
        yield store


async def count(store: EventStore) -> int:
    return int((await store.pool.fetch("SELECT count(*) FROM soma.events"))[0][0])


@pytest.mark.parametrize("use", USES)
async def test_use_after_the_end(store: EventStore, use: Callable[[Tx], object]) -> None:
    async with TransactionScope(store) as outer:
        async with TransactionScope(store) as tx:
            use(tx)
        with pytest.raises(TransactionEnded, match="inside of the block"):
            use(tx)
        use(outer)
    with pytest.raises(TransactionEnded):
        use(outer)


@pytest.mark.parametrize("use", USES)
async def test_use_in_another_task(store: EventStore, use: Callable[[Tx], object]) -> None:
    async def work(tx: Tx) -> None:
        use(tx)

    async with TransactionScope(store) as tx:
        with pytest.raises(TransactionElsewhere, match=r"used by task Task-.*asyncio\.timeout"):
            await asyncio.create_task(work(tx))
        with pytest.raises(TransactionElsewhere):
            await asyncio.gather(work(tx))
        await work(tx)


@pytest.mark.parametrize("use", USES)
async def test_use_in_a_thread(store: EventStore, use: Callable[[Tx], object]) -> None:
    async with TransactionScope(store) as tx:
        with pytest.raises(TransactionElsewhere, match="used by thread"):
            await asyncio.to_thread(use, tx)


async def test_a_task_started_inside_of_a_scope_has_transactions_of_its_own(store: EventStore) -> None:
    async def work(name: str) -> None:
        async with TransactionScope(store) as tx:
            tx.publish(event(name))

    with pytest.raises(ZeroDivisionError):
        async with TransactionScope(store) as tx:
            tx.publish(event("a"))
            await asyncio.gather(work("b"), work("c"))
            raise ZeroDivisionError
    assert await count(store) == 2


async def test_a_task_that_outlives_the_scope_begins_anew(store: EventStore) -> None:
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        async with TransactionScope(store) as tx:
            tx.publish(event("b"))

    async with TransactionScope(store) as tx:
        tx.publish(event("a"))
        later = asyncio.create_task(work())
    go.set()
    await later
    assert await count(store) == 2


async def test_a_generator_that_is_left_behind_in_a_scope_commits_nothing(store: EventStore) -> None:
    """Python closes it in another task: the scope rolls back there."""

    async def numbers() -> AsyncIterator[int]:
        async with TransactionScope(store) as tx:
            tx.publish(event("a"))
            yield 1

    async for _ in numbers():
        break
    gc.collect()
    await asyncio.sleep(0.1)
    async with TransactionScope(store) as tx:
        tx.publish(event("b"))
    assert await count(store) == 1
