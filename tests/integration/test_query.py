"""Finding events: filters, pages, hostile values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from soma_common.errors import TenantRequired, ValidationError
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS, EventFilter, EventStore
from soma_common.tracing.context import TraceContext
from tests.core_support import FakeClock, event, opened


@pytest.fixture(params=["18", "16"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("soma_database" if request.param == "18" else "soma_database16"))


TRACE = TraceContext.new()
START = datetime(2026, 1, 1, tzinfo=UTC)


async def _filled(store: EventStore, clock: FakeClock) -> list[Event]:
    given = []
    for number in range(24):
        clock.offset = timedelta(minutes=number - 60 * 24)
        given.append(
            event(
                f"id-{number % 3}", tenant_id=f"t{number % 2}", aggregate_type=f"kind-{number % 4}",
                event_type=f"type.n{number % 6}", service_id=f"svc-{number % 5}", correlation_id=f"c-{number // 4}",
                trace=TRACE if number % 7 == 0 else None,
            )
        )  # fmt: skip
        await store.publish(given[-1])
    return given


CONDITIONS: list[tuple[dict[str, Any], Any]] = [
    ({"trace_id": TRACE.trace_id}, lambda n: n % 7 == 0),
    ({"correlation_id": "c-2"}, lambda n: n // 4 == 2),
    ({"service_id": "svc-3"}, lambda n: n % 5 == 3),
    ({"event_type": "type.n5"}, lambda n: n % 6 == 5),
    ({"aggregate_type": "kind-1"}, lambda n: n % 4 == 1),
    ({"aggregate_id": "id-2"}, lambda n: n % 3 == 2),
    ({"aggregate_id": "id-2", "aggregate_type": "kind-1", "event_type": "type.n5"}, lambda n: n % 12 == 5),
    ({"event_type": "nothing.such"}, lambda _: False),
    ({}, lambda _: True),
]


async def test_every_filter_alone_and_with_a_tenant(database: str) -> None:
    clock = FakeClock()
    async with opened(database, clock=clock) as store:
        given = await _filled(store, clock)
        for conditions, wanted in CONDITIONS:
            expected = [e.event_id for n, e in enumerate(given) if wanted(n)]
            found = await store.query(tenant_id=ALL_TENANTS, **conditions)
            assert [e.event_id for e in found] == expected, conditions
            for tenant in ("t0", "t1"):
                mine = await store.query(tenant_id=tenant, newest_first=True, **conditions)
                assert [e.event_id for e in mine] == [
                    e.event_id for n, e in reversed(list(enumerate(given))) if wanted(n) and f"t{n % 2}" == tenant
                ]
        [one] = await store.query(tenant_id="t1", event_id=given[3].event_id)
        assert one.event_id == given[3].event_id
        assert len(await store.query(tenant_id="t0", event_id=str(given[3].event_id))) == 0


async def test_since_is_inclusive_and_until_is_not(database: str) -> None:
    clock = FakeClock()
    async with opened(database, clock=clock) as store:
        await _filled(store, clock)
        stamps = [e.timestamp for e in await store.query(tenant_id=ALL_TENANTS)]
        for since, until in ((3, 9), (0, 1), (5, 5), (9, 3)):
            found = await store.query(tenant_id=ALL_TENANTS, since=stamps[since], until=stamps[until])
            assert [e.timestamp for e in found] == stamps[since:until]
        assert len(await store.query(tenant_id=ALL_TENANTS, since=stamps[20])) == 4


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("limit", [1, 5, 12, 24, 100])
async def test_pages_in_both_directions(soma_database: str, newest_first: bool, limit: int) -> None:
    async with opened(soma_database) as store:
        for number in range(24):
            await store.publish(event(str(number), tenant_id=f"t{number % 2}"))
        for tenant, count in ((ALL_TENANTS, 24), ("t1", 12)):
            seen, after, pages = [], None, 0
            while True:
                page = await store.query(tenant_id=tenant, limit=limit, after=after, newest_first=newest_first)
                assert len(page) <= limit
                seen += [e.position for e in page]
                pages, after = pages + 1, page.next_after
                if after is None:
                    break
            assert seen == sorted(seen, reverse=newest_first)
            assert len(seen) == count
            assert pages == -(-count // limit)


async def test_the_default_limit_is_a_hundred(soma_database: str) -> None:
    async with opened(soma_database) as store:
        await store.publish([event("a") for _ in range(120)])
        page = await store.query(tenant_id="t")
        assert len(page) == 100
        assert page.next_after == 100
        assert page[0].version == 1
        assert [e.version for e in page[:3]] == [1, 2, 3]


async def test_a_tenant_must_be_named(soma_database: str) -> None:
    async with opened(soma_database) as store:
        for conditions in ({}, {"tenant_id": None}, {"tenant_id": ""}, {"event_type": "a.b"}):
            with pytest.raises(TenantRequired, match="ALL_TENANTS"):
                await store.query(**conditions)
    assert repr(ALL_TENANTS) == "ALL_TENANTS"


async def test_conditions_beside_a_filter_narrow_it(soma_database: str) -> None:
    async with opened(soma_database) as store:
        for tenant in ("t0", "t1"):
            await store.publish(event("a", tenant_id=tenant))
        wanted = EventFilter(tenant_id=ALL_TENANTS)
        assert len(await store.query(wanted)) == 2
        assert [e.tenant_id for e in await store.query(wanted, tenant_id="t1")] == ["t1"]
        assert len(await store.query(wanted, event_type="no.such")) == 0


@pytest.mark.parametrize(
    "conditions",
    [
        {"event_id": "nonsense"}, {"trace_id": "zz"}, {"event_id": 5}, {"aggregate_id": 5}, {"tenant_id": 5},
        {"aggregate_id": "nul\0"}, {"aggregate_id": "\ud800"}, {"tenant_id": "\ud800"}, {"correlation_id": b"x"},
        {"since": datetime(2026, 1, 1)}, {"until": "2026-01-01"}, {"limit": 0}, {"limit": 10_001},
        {"limit": "5"}, {"limit": -1}, {"after": -1}, {"after": 2**63}, {"after": "1; DROP TABLE"},
        {"service_id": uuid4()},
    ],
)  # fmt: skip
async def test_conditions_that_cannot_be_meant(soma_database: str, conditions: dict[str, Any]) -> None:
    async with opened(soma_database) as store:
        with pytest.raises(ValidationError):
            await store.query(**({"tenant_id": "t"} | conditions))


@pytest.mark.parametrize("name", ["correlation_id", "service_id", "event_type", "aggregate_type", "aggregate_id"])
async def test_hostile_values_find_nothing_and_break_nothing(soma_database: str, name: str) -> None:
    async with opened(soma_database) as store:
        await store.publish(event("a"))
        for value in ("' OR '1'='1", "%", "_", "$1", "*", "a'--", "🛩", "x" * 10_000, "NULL"):
            assert len(await store.query(tenant_id="t", **{name: value})) == 0
        assert len(await store.query(tenant_id="t")) == 1


async def test_an_unknown_condition_is_a_mistake(soma_database: str) -> None:
    async with opened(soma_database) as store:
        with pytest.raises(TypeError):
            await store.query(tenant_id="t", colour="red")


async def test_a_stream_is_read_from_a_version_on(database: str) -> None:
    async with opened(database) as store:
        await store.publish([event("a") for _ in range(10)])
        await store.publish(event("a", tenant_id="other"))
        stream = event("a").stream
        assert [e.version async for e in store.read(stream, from_version=4, page=3)] == [4, 5, 6, 7, 8, 9, 10]
        assert [e.version async for e in store.read(stream, from_version=11)] == []
        assert [e async for e in store.read(event("none").stream)] == []
        assert await store.stream_version(stream) == 10
        assert await store.stream_version(event("none").stream) == 0
