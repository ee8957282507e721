"""A central log that was lost is made again from the services' own logs, and shows their choreographies as one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest
from click.testing import CliRunner

from soma_common import Event, RecordedEvent, SagaStatus, Soma, SomaConfig
from soma_common.cli.collect import collect
from soma_common.cli.saga import saga
from soma_common.collector.copying import Copied, copy_log
from soma_common.errors import DatabaseUnavailable, SagaNotFound
from soma_common.events.append import AppendSettings
from soma_common.events.standard import SagaCompensating, SagaStepCompleted
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.postgres.pool import Pool
from soma_common.sagas.announcing import announced
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.testing import make_event
from soma_common.testing.backends import PostgresHandle
from tests.integration.sagas.shop import TENANT, OrderPlaced, Running, event, of_all
from tests.saga_support import told
from tests.sessions import cut_all


@pytest.fixture
def databases(soma_postgres: PostgresHandle, soma_database: str) -> Iterator[dict[str, str]]:
    """One for each service, and ``central``."""
    template = soma_database.rpartition("/")[2]
    names = {service: f"soma_copy_{uuid.uuid4().hex[:12]}" for service in ("orders", "stock")}
    dsns = {service: soma_postgres.sql.create_database(name, template=template) for service, name in names.items()}
    yield dsns | {"central": soma_database}
    for name in names.values():
        soma_postgres.sql.drop_database(name)


@pytest.fixture
async def central(databases: dict[str, str]) -> AsyncIterator[Pool]:
    async with Pool(databases["central"]) as pool:
        yield pool


async def _copied(service: Pool, central: Pool) -> Copied:
    return [done async for done in copy_log(service, central)][-1]


async def _all(pool: Pool) -> list[RecordedEvent]:
    store = EventStore(pool, AppendSettings("tests"))
    found: list[RecordedEvent] = []
    async for page, _ in store.so_far():
        found += page
    return found


async def test_a_log_is_copied_once_however_often(databases: dict[str, str], central: Pool) -> None:
    async with Soma(SomaConfig(postgres_dsn=databases["orders"])) as soma:
        await soma.publish([make_event({"n": n}, event_type="a.b", aggregate_id=f"s-{n % 7}") for n in range(1300)])
        assert await _copied(soma.pool, central) == Copied(1300, 1300)
        assert await _copied(soma.pool, central) == Copied(1300, 0)
        await soma.publish(make_event({"n": -1}, event_type="a.b"))
        assert await _copied(soma.pool, central) == Copied(1301, 1)
        here, there = await _all(soma.pool), await _all(central)
    assert [(e.event_id, e.version, e.timestamp, e.payload) for e in here] == [
        (e.event_id, e.version, e.timestamp, e.payload) for e in there
    ]


async def test_what_is_broken_off_goes_on_and_two_at_once_meet(databases: dict[str, str], central: Pool) -> None:
    async with Soma(SomaConfig(postgres_dsn=databases["orders"])) as soma:
        await soma.publish([make_event({"n": n}, event_type="a.b", aggregate_id=f"s-{n % 7}") for n in range(2600)])
        async with aclosing(copy_log(soma.pool, central)) as copying:
            async for done in copying:
                if done.read >= 1000:
                    break
        assert 0 < done.read == done.fresh == len(await _all(central)) < 2600
        with pytest.raises(DatabaseUnavailable):
            async for _ in copy_log(soma.pool, central):
                await cut_all(databases["orders"])
        first, second = await asyncio.gather(_copied(soma.pool, central), _copied(soma.pool, central))
        assert first.read == second.read == 2600
        assert len({event.event_id for event in await _all(central)}) == len(await _all(central)) == 2600


async def _told_by(service: str, *payloads: SagaStepCompleted | SagaCompensating, saga_id: uuid.UUID) -> list[Event]:
    return [
        Event(**_fields(announced(saga_id, TENANT, payload, correlation_id="o-1")), service_id=service)
        for payload in payloads
    ]


def _fields(one: Event) -> dict[str, object]:
    names = ("payload", "tenant_id", "aggregate_type", "aggregate_id", "correlation_id")
    return {name: getattr(one, name) for name in names}


async def test_a_choreography_is_one_though_no_service_knows_all(databases: dict[str, str], central: Pool) -> None:
    """Each log has what its own service announced; copied in either order they come to the same."""
    saga_id = Choreography("trip").saga_id(TENANT, "o-1")

    def step(service: str, name: str, *, undone: bool = False) -> SagaStepCompleted:
        return SagaStepCompleted(
            saga_id=str(saga_id), name="trip", step=f"{service}/{name}", step_number=1, undone=undone, duration_ms=1.5
        )

    turn = SagaCompensating(saga_id=str(saga_id), name="trip", failed_step="stock/take", reason="nothing left")
    said = {
        "orders": [step("orders", "note"), step("orders", "note", undone=True)],
        "stock": [step("stock", "look"), turn, step("stock", "look", undone=True)],
    }
    for service, payloads in said.items():
        async with Soma(SomaConfig(postgres_dsn=databases[service], service_id=service)) as soma:
            await soma.publish(await _told_by(service, *payloads, saga_id=saga_id))
    for service in ("stock", "orders"):
        async with Pool(databases[service]) as pool:
            await _copied(pool, central)
    view = await SagaOrchestrator(central).get_saga(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert (view.reason, view.error) == ("stock/take", "nothing left")
    assert set(told(view.journal)) == {
        "done orders/note", "undone orders/note", "done stock/look", "undone stock/look", "turned",
    }  # fmt: skip
    assert {entry.who for entry in view.journal} == {"orders", "stock"}


async def test_announcements_that_lie_change_nothing(databases: dict[str, str], central: Pool) -> None:
    saga_id = Choreography("trip").saga_id(TENANT, "o-1")
    of_another = SagaStepCompleted(saga_id=str(uuid.uuid4()), name="trip", step="orders/note", step_number=1)
    of_others = SagaStepCompleted(saga_id=str(saga_id), name="trip", step="stock/take", step_number=1)
    no_name = SagaStepCompleted(saga_id=str(saga_id), name="; DROP", step="orders/note", step_number=1)
    async with Soma(SomaConfig(postgres_dsn=databases["orders"], service_id="orders")) as soma:
        await soma.publish(await _told_by("orders", of_another, of_others, no_name, saga_id=saga_id))
        assert await _copied(soma.pool, central) == Copied(3, 3)
    with pytest.raises(SagaNotFound):
        await SagaOrchestrator(central).get_saga(saga_id)


async def test_the_real_thing_as_its_service_sees_it(databases: dict[str, str], central: Pool) -> None:
    part = of_all("order")["orders"]
    async with Running(SomaConfig(service_id="orders", postgres_dsn=databases["orders"]), part) as orders:
        await orders.publish(event(OrderPlaced(order_id="1", how="refuse"), "o-1"))
        await orders.stands(SagaStatus.RUNNING, "done orders/note", correlation="o-1")
        await _copied(orders.soma.pool, central)
        mine, seen = await orders.view("o-1"), await SagaOrchestrator(central).get_saga(part.saga_id(TENANT, "o-1"))
    assert mine is not None
    assert [line for line in told(mine.journal) if not line.startswith("begun")] == told(seen.journal)


def test_the_command_copies_and_shows(databases: dict[str, str]) -> None:
    asyncio.run(_publish(databases["orders"]))
    env = {"SOMASTACK_POSTGRES_DSN": databases["central"], "SOMA_DEPLOY_MODE": ""}
    for fresh in (3, 0):
        done = CliRunner().invoke(collect, ["--from-log", databases["orders"]], env=env)
        assert (done.exit_code, done.output) == (0, f"log 1 of 1: 3 events read, {fresh} of them new\n")
    gone = CliRunner().invoke(collect, ["--from-log", "postgresql://nobody:secret@127.0.0.1:1/x"], env=env)
    assert gone.exit_code != 0
    assert "secret" not in gone.output
    shown = CliRunner().invoke(saga, ["list", "--all-tenants", "--all"], env=env)
    assert shown.exit_code == 0


async def _publish(dsn: str) -> None:
    async with Soma(SomaConfig(postgres_dsn=dsn)) as soma:
        await soma.publish([make_event({"n": n}, event_type="a.b") for n in range(3)])
        assert len(await soma.store.query(tenant_id=ALL_TENANTS)) == 3
