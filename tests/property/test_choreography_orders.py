"""REQUIREMENTS 29: two services of a choreography agree in the end, in whatever order and however often events come.

The handlers of both work on databases of their own; the world between them is the example's: it delivers what they
publish in any order, some of it twice, and without any inbox before them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soma_common.consumer.handlers import HandlerContext
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.participation import Participant
from soma_common.sagas.views import SagaView
from soma_common.testing.backends import PostgresHandle
from tests.integration.sagas.shop import MODELS, TABLE, TENANT, OrderPlaced, OrderRejected, event, of_all

_UNDO = {"note": "forget", "reserve": "release"}


@dataclass(frozen=True)
class _Service:
    """One service on a database of its own."""

    name: str
    pool: Pool
    part: Choreography

    async def take(self, recorded: RecordedEvent) -> list[RecordedEvent]:
        """Handle an event, in a transaction; what was published in it."""
        handlers, collected = Participant(self.part, self.name).handlers(), list[Event]()
        async with self.pool.transaction() as tx:
            for handler in handlers.of(recorded.event_type):
                ctx = HandlerContext(self.part.consumer, recorded, tx, collected)
                await handler.handle(handler.prepared(recorded, None), ctx)  # type: ignore[misc]  # it is async
            if not collected:
                return []
            return await self.publish(collected, tx=tx)

    async def publish(self, events: list[Event], tx: Any = None) -> list[RecordedEvent]:
        """Record events; as the other service gets them, with plain payloads."""
        store = EventStore(self.pool, AppendSettings(self.name, MODELS))
        found = await store.publish(events, tx=tx)
        return [each.with_payload(_plain(each.payload), each.schema_version) for each in found]

    async def view(self, correlation: str) -> SagaView:
        """The journal here."""
        return await SagaOrchestrator(self.pool).get_saga(self.part.saga_id(TENANT, correlation))

    async def done(self, correlation: str) -> list[str]:
        """What its steps did here."""
        rows = await self.pool.fetch("SELECT what FROM done WHERE correlation = $1 ORDER BY place", correlation)
        return [row[0].split()[0] for row in rows]


def _plain(payload: Any) -> Any:
    return payload.model_dump(mode="json") if hasattr(payload, "model_dump") else payload


@pytest.fixture(scope="module")
def databases(soma_postgres: PostgresHandle) -> Iterator[dict[str, str]]:
    names = {service: f"soma_choreo_{service}_{uuid.uuid4().hex[:8]}" for service in ("orders", "stock")}
    yield {service: soma_postgres.sql.create_database(name) for service, name in names.items()}
    for name in names.values():
        soma_postgres.sql.drop_database(name)


@pytest.fixture(scope="module")
def migrated(databases: dict[str, str]) -> dict[str, str]:
    async def made() -> None:
        for dsn in databases.values():
            await upgrade(dsn)
            async with Pool(dsn) as pool:
                await pool.fetch(TABLE)

    asyncio.run(made())
    return databases


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=st.sampled_from(["", "", "refuse"]),
    rejected=st.sampled_from([0, 0, 1, 2]),
    turned=st.booleans(),
    doubles=st.integers(0, 1),
    choices=st.lists(st.integers(0, 999), max_size=120),
)
def test_both_services_agree_in_the_end(
    migrated: dict[str, str], how: str, rejected: int, turned: bool, doubles: int, choices: list[int]
) -> None:
    asyncio.run(_trial(migrated, how, rejected, turned, doubles, choices))


async def _trial(
    databases: dict[str, str], how: str, rejected: int, turned: bool, doubles: int, choices: list[int]
) -> None:
    correlation = uuid.uuid4().hex
    async with (
        Pool(PoolSettings(databases["orders"], size=2)) as one,
        Pool(PoolSettings(databases["stock"], size=2)) as two,
    ):
        parts = of_all()
        services = [_Service("orders", one, parts["orders"]), _Service("stock", two, parts["stock"])]
        turn = parts["orders"].turn(TENANT, correlation, reason="a person")
        first = [
            *(event(OrderPlaced(order_id=correlation, how=how), correlation) for _ in range(1 + doubles)),
            *(event(OrderRejected(order_id=correlation), correlation) for _ in range(rejected)),
            *([turn] if turned else []),
        ]  # fmt: skip
        await _delivered(services, await services[0].publish(first), choices)
        views = [await service.view(correlation) for service in services]
        done = await services[0].done(correlation) + await services[1].done(correlation)
        _check(views, done, failed=bool(how or rejected or turned))


async def _delivered(services: list[_Service], first: list[RecordedEvent], choices: list[int]) -> None:
    """Every event comes to every service: in the order of the choices, some twice."""
    open_, left = [(service, each) for service in services for each in first], iter(choices)
    while open_:
        choice = next(left, 1)
        service, recorded = open_.pop(choice % len(open_))
        if choice % 7 == 0:
            open_.append((service, recorded))
        made = await service.take(recorded)
        open_ += [(other, each) for other in services for each in made]


def _check(views: list[SagaView], done: list[str], *, failed: bool) -> None:
    assert {view.status for view in views} == {SagaStatus.COMPENSATED if failed else SagaStatus.COMPLETED}
    assert _steps(views[0], "done") == _steps(views[1], "done")
    assert _steps(views[0], "undone", "undo-skipped") == _steps(views[1], "undone", "undo-skipped")
    assert len(done) == len(set(done)), done
    for view in views:
        _check_journal(view)
    if not failed:
        assert sorted(done) == ["confirm", "note", "reserve"]
    for step, undo in _UNDO.items():
        assert (undo in done) == (failed and step in done), done


def _check_journal(view: SagaView) -> None:
    """Each is told once, and none of its own steps is done behind the turn."""
    told = [(entry.what, entry.step) for entry in view.journal]
    assert len(told) == len(set(told)), told
    turns = [entry.number for entry in view.journal if entry.what == "turned"]
    begun = [entry.number for entry in view.journal if entry.what == "begun"]
    assert len(turns) <= 1
    assert not turns or all(number < turns[0] for number in begun)
    assert [entry.number for entry in view.journal] == list(range(1, view.length + 1))


def _steps(view: SagaView, *what: str) -> set[str]:
    return {entry.step for entry in view.journal if entry.what in what}
