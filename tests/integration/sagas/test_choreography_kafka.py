"""Choreographies of two services with databases of their own, which meet in Kafka."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from soma_common.config import SomaConfig
from soma_common.deployment import DeployMode
from soma_common.events.store import EventFilter
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.replies import EVENTS
from soma_common.testing.backends import KafkaHandle, PostgresHandle
from soma_common.tracing.context import TraceContext
from tests.integration.sagas.shop import TABLE, TENANT, OrderPlaced, OrderRejected, Running, event, of_all
from tests.integration.sagas.shop_process import process
from tests.saga_support import told
from tests.waiting import until


@pytest.fixture
def another_database(soma_postgres: PostgresHandle) -> Iterator[str]:
    name = f"soma_choreo_{uuid.uuid4().hex[:12]}"
    yield soma_postgres.sql.create_database(name)
    soma_postgres.sql.drop_database(name)


@pytest.fixture(params=["json", "avro"])
async def services(
    request: pytest.FixtureRequest, soma_database: str, another_database: str, soma_kafka: KafkaHandle,
    soma_topic: Callable[..., str], tmp_path: Path,
) -> AsyncIterator[dict[str, Running]]:  # fmt: skip
    """Both services, with names and topics of their own: the broker is shared with other tests."""
    registry = request.getfixturevalue("soma_registry").url if request.param == "avro" else ""
    await upgrade(another_database)
    suffix = uuid.uuid4().hex[:8]
    dsns = {"orders": soma_database, "stock": another_database}
    topics = {service: soma_topic(f"soma.{service}", partitions=3) for service in dsns}
    async with AsyncExitStack() as stack:
        found = {}
        for service, part in of_all(f"order-{suffix}").items():
            config = SomaConfig(
                mode=DeployMode.SOMASTACK, service_id=f"{service}-{suffix}", postgres_dsn=dsns[service],
                kafka_bootstrap=soma_kafka.bootstrap, topic=topics[service], registry_url=registry,
                folder=tmp_path / service,
            )  # fmt: skip
            reads = {part.consumer: list(topics.values())}
            found[service] = await stack.enter_async_context(Running(config, part, reads=reads))
        yield found


def steps(view_of: Running, journal: list[str]) -> list[str]:
    """The journal without what makes the test's services unique."""
    suffix = view_of.soma.config.service_id.rpartition("-")[2]
    return [line.replace(f"-{suffix}", "") for line in journal]


async def test_each_service_shows_the_whole(services: dict[str, Running]) -> None:
    trace, correlation = TraceContext.new(), uuid.uuid4().hex
    orders, stock = services["orders"], services["stock"]
    await orders.publish(event(OrderPlaced(order_id="1"), correlation, trace=trace))
    for service, others in ((orders, stock), (stock, orders)):
        theirs = f"done {others.soma.config.service_id}"
        wanted = [f"{theirs}/note", f"{theirs}/confirm"] if service is stock else [f"{theirs}/reserve"]
        view = await service.stands(SagaStatus.COMPLETED, *wanted, correlation=correlation)
        done = {line for line in steps(service, told(view.journal)) if not line.startswith("begun")}
        assert done == {"done orders/note", "done stock/reserve", "done orders/confirm", "ended"}
        assert view.trace_id == trace.trace_id
        events = await service.soma.store.query(EventFilter(tenant_id=TENANT, correlation_id=correlation))
        assert {each.trace_id for each in events} == {trace.trace_id}
    (row,) = (entry for entry in view.journal if entry.step.endswith("/note"))
    assert (row.who, row.result) == (orders.soma.config.service_id, None)  # results stay at home
    assert await stock.done(correlation) == ["reserve 1"]


async def test_a_refusal_undoes_both(services: dict[str, Running]) -> None:
    orders, stock, correlation = services["orders"], services["stock"], uuid.uuid4().hex
    await orders.publish(event(OrderPlaced(order_id="1", how="refuse"), correlation))
    undone = f"undone {orders.soma.config.service_id}/note"
    failed = f"failed {stock.soma.config.service_id}/reserve"
    for service in (orders, stock):
        view = await service.stands(SagaStatus.COMPENSATED, undone, failed, correlation=correlation)
        assert view.reason == f"{stock.soma.config.service_id}/reserve"
        assert view.error == "nothing left"
    assert await orders.done(correlation) == ["note 1", "forget 1"]
    assert await stock.done(correlation) == []


async def test_a_failure_event_undoes_both(services: dict[str, Running]) -> None:
    orders, stock, correlation = services["orders"], services["stock"], uuid.uuid4().hex
    await orders.publish(event(OrderPlaced(order_id="1"), correlation))
    await orders.stands(SagaStatus.COMPLETED, correlation=correlation)
    await stock.stands(SagaStatus.COMPLETED, correlation=correlation)
    await stock.publish(event(OrderRejected(order_id="1"), correlation))
    undone = [f"undone {orders.soma.config.service_id}/note", f"undone {stock.soma.config.service_id}/reserve"]
    for service in (orders, stock):
        await service.stands(SagaStatus.COMPENSATED, *undone, correlation=correlation)
    assert await orders.done(correlation) == ["note 1", "confirm 1 7", "forget 1"]
    assert await stock.done(correlation) == ["reserve 1", "release 1 7"]


async def test_announcements_meet_in_a_topic_of_their_own(services: dict[str, Running]) -> None:
    orders, correlation = services["orders"], uuid.uuid4().hex
    await orders.publish(event(OrderPlaced(order_id="1"), correlation))
    await orders.stands(SagaStatus.COMPLETED, correlation=correlation)
    assert orders.soma._routes.of(orders.part.turn(TENANT, correlation, reason="x")) == EVENTS
    assert orders.soma._routes.own == [orders.soma.config.topic]  # other consumers do not read it unasked


async def test_many_orders_all_come_to_their_end_in_both(services: dict[str, Running]) -> None:
    """Their events and announcements meet in many transactions."""
    orders, run, count = services["orders"], uuid.uuid4().hex, 60
    names = {f"{run}-{n}": "refuse" if n % 3 == 0 else "" for n in range(count)}
    await asyncio.gather(*(
        orders.publish(event(OrderPlaced(order_id=name, how=how), name)) for name, how in names.items()
    ))  # fmt: skip
    for service in services.values():
        for name, how in names.items():
            await service.stands(SagaStatus.COMPENSATED if how else SagaStatus.COMPLETED, correlation=name)
    for service in services.values():
        rows = await service.soma.pool.fetch("SELECT what FROM done GROUP BY 1 HAVING count(*) > 1")
        assert rows == []


async def test_a_service_that_is_killed_goes_on_where_it_was(
    soma_database: str, another_database: str, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]
) -> None:
    """Stock's process dies between effect and commit, and again as soon as that is committed."""
    await upgrade(another_database)
    suffix = uuid.uuid4().hex[:8]
    topics = [soma_topic("soma.orders", partitions=1), soma_topic("soma.stock", partitions=1)]
    part = of_all(f"order-{suffix}")["orders"]
    shared = {"kafka_bootstrap": soma_kafka.bootstrap}
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, service_id=f"orders-{suffix}", postgres_dsn=soma_database, topic=topics[0], **shared
    )  # fmt: skip
    theirs = {"service_id": f"stock-{suffix}", "topic": topics[1], "instance": "one", **shared}
    given = {"config": theirs, "name": part.name, "topics": topics}
    async with Running(config, part, reads={part.consumer: topics}) as orders, Pool(another_database) as stock:
        await stock.fetch(TABLE)
        await orders.publish(event(OrderPlaced(order_id="1", how="die")))
        with process(another_database, **given) as first:
            await until(lambda: first.poll() is not None, what="its death")
        with process(another_database, **given):
            await until(lambda: stock.fetch("SELECT what FROM done WHERE what = 'reserve 1'"))
        with process(another_database, **given):
            await orders.stands(SagaStatus.COMPLETED, f"done stock-{suffix}/reserve")
            await orders.publish(event(OrderRejected(order_id="1")))
            await orders.stands(SagaStatus.COMPENSATED, f"undone stock-{suffix}/reserve")
        rows = await stock.fetch("SELECT what FROM done WHERE correlation = 'o-1' ORDER BY place")
    assert [row[0] for row in rows] == ["reserve 1", "release 1 7"]
