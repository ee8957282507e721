"""@trace_transaction on real PostgreSQL: what it records of calls that commit, fail, nest, and cannot be told of."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from soma_common import Soma, SomaConfig, Tx, trace_transaction
from soma_common.errors import ConfigurationError, PayloadInvalid, TransactionDoomed, ValidationError
from soma_common.events.models import Event, RecordedEvent
from soma_common.postgres.pool import Pool
from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import event
from tests.waiting import until

if TYPE_CHECKING:
    pass


@pytest.fixture
async def soma(soma_database: str) -> AsyncIterator[Soma]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    async with Soma(SomaConfig(postgres_dsn=soma_database, service_id="shop")) as soma:
        yield soma


async def told(soma: Soma) -> list[str]:
    """The types of the recorded events, in their order."""
    return [event.event_type for event in await soma.store.query(tenant_id="default")]


async def events(soma: Soma, **wanted: Any) -> list[RecordedEvent]:
    return list(await soma.store.query(**({"tenant_id": "default"} | wanted)))


async def rows(soma: Soma) -> int:
    return int((await soma.pool.fetch("SELECT count(*) FROM rows"))[0][0])


INSERT = "INSERT INTO rows VALUES ('a')"


async def test_a_call_that_commits(soma: Soma) -> None:
    @trace_transaction(name="place-order")
    async def place(what: str, tx: Tx) -> str:
        await tx.conn.execute(INSERT)
        tx.publish(Event(payload={}, event_type="order.placed", tenant_id="default", aggregate_id=what))
        return what.upper()

    assert await place("lamp") == "LAMP"
    started, placed, committed = await events(soma)
    assert [started.event_type, placed.event_type, committed.event_type] == [
        "txn.started", "order.placed", "txn.committed",
    ]  # fmt: skip
    assert started.aggregate_type == "txn"
    assert started.aggregate_id == started.correlation_id == started.payload["txn_id"] == committed.payload["txn_id"]
    assert started.payload["name"] == "place-order"
    assert committed.payload["duration_ms"] > 0
    assert started.trace_id == placed.trace_id == committed.trace_id
    assert await rows(soma) == 1


async def test_a_call_that_fails(soma: Soma) -> None:
    @trace_transaction(name="place-order")
    async def place(tx: Tx) -> None:
        await tx.conn.execute(INSERT)
        tx.publish(event("x"))
        raise KeyError("no \0 such \ud800 item")

    with pytest.raises(KeyError):
        await place()
    (failed,) = await events(soma)
    assert failed.event_type == "txn.failed"
    assert failed.payload["error_type"] == "KeyError"
    assert "such" in failed.payload["error"]
    assert failed.payload["duration_ms"] > 0
    assert await rows(soma) == 0


async def test_plain_functions_do_the_same(soma: Soma) -> None:
    @trace_transaction(name="plain")
    def place(fail: bool, *, tx: Tx | None = None) -> str:
        assert tx is not None
        tx.conn.execute(INSERT)
        if fail:
            raise KeyError("no")
        return "placed"

    with pytest.raises(KeyError):
        await asyncio.to_thread(place, True)
    assert place(False) == "placed"
    assert await told(soma) == ["txn.failed", "txn.started", "txn.committed"]
    assert await rows(soma) == 1


async def test_plain_functions_use_their_connection_again_and_share_it_inside(soma: Soma) -> None:
    pids: list[tuple[int, ...]] = []

    @soma.trace_transaction(name="inner", events=())
    def inner(tx: Tx) -> int:
        return int(tx.conn.info.backend_pid)

    @soma.trace_transaction(name="outer", events=())
    def outer(tx: Tx) -> None:
        pids.append((tx.conn.info.backend_pid, inner()))

    for _ in range(2):
        outer()
    assert len({pid for pair in pids for pid in pair}) == 1
    with soma.sync_transaction(), soma.sync_transaction(mode="new") as other:
        assert other.conn.info.backend_pid != pids[0][0]


async def test_many_threads_at_once(soma: Soma) -> None:
    @soma.trace_transaction(name="plain")
    def place(number: int, tx: Tx) -> None:
        tx.conn.execute("INSERT INTO rows VALUES (%s)", (str(number),))
        if number % 2:
            raise KeyError(number)

    await asyncio.gather(*(asyncio.to_thread(place, number) for number in range(20)), return_exceptions=True)
    assert await rows(soma) == 10
    assert sorted(await told(soma)) == ["txn.committed"] * 10 + ["txn.failed"] * 10 + ["txn.started"] * 10


async def test_connections_of_plain_functions_are_closed_with_the_application(soma_database: str) -> None:
    soma = Soma(SomaConfig(postgres_dsn=soma_database))

    @soma.trace_transaction()
    def place() -> None: ...

    for _ in range(2):
        async with soma:
            place()
    with pytest.raises(ConfigurationError, match="not open"):
        place()
    gc.collect()  # an open connection would warn here, and a warning is an error
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'psql'"
    async with Pool(soma_database) as pool:
        await until(lambda: _only_mine(pool, count))


async def _only_mine(pool: Pool, count: str) -> bool:
    return int((await pool.fetch(count))[0][0]) == 1


@pytest.mark.parametrize(
    ("moments", "good", "bad"),
    [
        (("started", "committed", "failed"), ["txn.started", "txn.committed"], ["txn.failed"]),
        (("failed",), [], ["txn.failed"]),
        (("committed",), ["txn.committed"], []),
        ((), [], []),
    ],
)
async def test_which_events_are_recorded(soma: Soma, moments: Any, good: list[str], bad: list[str]) -> None:
    @trace_transaction(name="n", events=moments)
    async def work(fail: bool) -> None:
        if fail:
            raise KeyError

    await work(False)
    assert await told(soma) == good
    with pytest.raises(KeyError):
        await work(True)
    assert await told(soma) == good + bad


async def test_the_family_may_have_another_name(soma: Soma) -> None:
    @trace_transaction(name="n", event_type="order.txn", tenant_id="acme", correlation_id="c-1")
    async def work(fail: bool) -> None:
        if fail:
            raise KeyError

    await work(False)
    with pytest.raises(KeyError):
        await work(True)
    found = await events(soma, tenant_id="acme", correlation_id="c-1")
    assert [e.event_type for e in found] == ["order.txn.started", "order.txn.committed", "order.txn.failed"]
    assert {e.aggregate_type for e in found} == {"order.txn"}
    assert found[0].payload["name"] == "n"


async def test_tenant_and_correlation_come_from_the_arguments_and_are_inherited(soma: Soma) -> None:
    @trace_transaction(name="inner")
    async def inner() -> None: ...

    @trace_transaction(name="outer", tenant_id=lambda tenant, **_: tenant, correlation_id=lambda _, order: order)
    async def outer(tenant: str, order: str) -> None:
        await inner()

    await outer("acme", order="o-1")
    found = await events(soma, tenant_id="acme", correlation_id="o-1")
    assert [e.payload["name"] for e in found] == ["outer", "inner", "inner", "outer"]
    assert len({e.trace_id for e in found}) == 1
    assert len({e.position for e in found}) == 4
    assert len(await soma.pool.fetch("SELECT DISTINCT xid FROM soma.events")) == 1


@pytest.mark.parametrize("wrong", ["a\nb", "", None, 7])
async def test_a_wrong_tenant_is_told_before_anything_is_done(soma: Soma, wrong: Any) -> None:
    @trace_transaction(name="n", events=["failed"], tenant_id=lambda tenant: tenant)
    async def work(tenant: str, tx: Tx) -> None:
        await tx.conn.execute(INSERT)

    with pytest.raises(ValidationError):
        await work(wrong)
    assert await rows(soma) == 0


async def test_a_function_in_an_open_scope_takes_part_in_it(soma: Soma) -> None:
    @trace_transaction(name="n")
    async def work(tx: Tx) -> None:
        await tx.conn.execute(INSERT)

    with pytest.raises(ZeroDivisionError):
        async with soma.transaction():
            await work()
            raise ZeroDivisionError
    assert (await told(soma), await rows(soma)) == ([], 0)
    async with soma.transaction():
        await work()
    assert (await told(soma), await rows(soma)) == (["txn.started", "txn.committed"], 1)


@pytest.mark.parametrize("mode", ["join", "savepoint", "new"])
async def test_a_function_that_fails_in_an_open_scope_tells_of_it_at_once(soma: Soma, mode: Any) -> None:
    @trace_transaction(name="n", mode=mode)
    async def work(tx: Tx) -> None:
        await tx.conn.execute(INSERT)
        raise KeyError

    try:
        async with soma.transaction() as tx:
            tx.publish(Event(payload={}, event_type="kept.event", tenant_id="default", aggregate_id="x"))
            with pytest.raises(KeyError):
                await work()
            assert await told(soma) == ["txn.failed"]
    except TransactionDoomed:
        assert mode == "join"
    assert await told(soma) == ["txn.failed"] + ["kept.event"] * (mode != "join")
    assert await rows(soma) == 0


async def test_what_fails_at_the_end_of_the_transaction_is_a_failure(soma: Soma) -> None:
    @trace_transaction(name="n")
    async def work(tx: Tx) -> None:
        tx.publish(event("x", payload={"what": object()}))

    with pytest.raises(PayloadInvalid):
        await work()
    assert await told(soma) == ["txn.failed"]


async def test_a_cancelled_call_tells_nothing(soma: Soma) -> None:
    @trace_transaction(name="n")
    async def work(tx: Tx) -> None:
        await tx.conn.execute(INSERT)
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await work()
    assert (await told(soma), await rows(soma)) == ([], 0)


@pytest.mark.parametrize("plain", [False, True])
async def test_a_failure_that_cannot_be_recorded_leaves_the_error_as_it_is(
    soma: Soma, caplog: pytest.LogCaptureFixture, plain: bool
) -> None:
    await soma.pool.fetch("ALTER TABLE soma.events ADD CONSTRAINT no CHECK (event_type <> 'txn.failed') NOT VALID")

    @trace_transaction(name="async")
    async def awaited() -> None:
        raise KeyError("mine")

    @trace_transaction(name="plain")
    def blocking() -> None:
        raise KeyError("mine")

    with caplog.at_level(logging.WARNING, "soma_common.decorators"), pytest.raises(KeyError, match="mine"):
        if plain:
            blocking()
        else:
            await awaited()
    assert "was not recorded" in caplog.text


async def test_the_span_is_the_parent_of_what_happens_inside(soma: Soma) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")

    @trace_transaction(name="place-order")
    async def work(tx: Tx) -> None:
        tx.publish(Event(payload={}, event_type="order.placed", tenant_id="default", aggregate_id="x"))

    with tracer.start_as_current_span("request") as span:
        await work()
        mine = f"{span.get_span_context().trace_id:032x}"
    assert {e.trace_id for e in await events(soma)} == {mine}
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_thread_of_its_own_is_outside(soma: Soma) -> None:
    @trace_transaction(name="n", events=())
    def plain(tx: Tx) -> None:
        tx.conn.execute(INSERT)

    with pytest.raises(ZeroDivisionError), soma.sync_transaction():
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert await rows(soma) == 1
