"""Publishing: expected versions, several keys, idempotency, stamps."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from soma_common.errors import (
    AppendError,
    IdempotencyKeyReused,
    TransactionConflict,
    ValidationError,
    WrongExpectedVersion,
)
from soma_common.events.append import Published
from soma_common.events.models import ANY, EXISTS, NO_STREAM
from soma_common.events.store import EventStore
from soma_common.postgres.errors import translated
from tests.core_support import Reader, connected, event, opened, waiting_for_lock


@pytest.fixture(params=["18", "16"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("soma_database" if request.param == "18" else "soma_database16"))


async def _count(store: EventStore, table: str) -> int:
    return int((await store.pool.fetch(f"SELECT count(*) FROM soma.{table}"))[0][0])


async def test_what_is_recorded_is_what_is_read(database: str) -> None:
    given = event(
        "a:b",
        payload={"text": "ünï ✈", "deep": [{"n": None}], "big": 2**64 - 1, "f": 0.1},
        metadata={"k": "v"},
        causation_id="cause",
        baggage="a=1",
    )
    async with opened(database) as store:
        [recorded] = await store.publish(given)
        assert (recorded.version, recorded.position) == (1, 1)
        [read] = [e async for e in store.read(given.stream)]
        assert read == recorded
        assert read.event_id == given.event_id
        assert read.correlation_id == str(given.event_id)
        assert read.idempotency_key == str(given.event_id)
        assert read.service_id == "svc"
        assert read.trace_id == recorded.trace.trace_id
        [row] = await store.pool.fetch("SELECT position, topic, key, event_id, version, shard FROM soma.outbox")
        assert tuple(row)[:5] == (1, "soma.test", b"t:default:a%3Ab", given.event_id, 1)


@pytest.mark.parametrize("expected", [ANY, NO_STREAM])
async def test_a_new_stream_begins_at_version_one(database: str, expected: int) -> None:
    async with opened(database) as store:
        published = await store.publish([event("a"), event("a")], expected_version=expected)
        assert [e.version for e in published] == [1, 2]
        assert published[0].timestamp < published[1].timestamp


@pytest.mark.parametrize("expected", [EXISTS, 1, 7])
@pytest.mark.parametrize("streams", [1, 2])
async def test_a_new_stream_never_begins_at_a_wrong_expected_version(
    database: str, expected: int, streams: int
) -> None:
    async with opened(database) as store:
        batch = [event(str(n)) for n in range(streams)]
        with pytest.raises(WrongExpectedVersion) as caught:
            await store.publish(batch, expected_version=expected)
        assert caught.value.actual == 0
        assert await _count(store, "streams") == await _count(store, "events") == 0


@pytest.mark.parametrize(
    ("expected", "fits"), [(ANY, True), (EXISTS, True), (2, True), (NO_STREAM, False), (1, False), (3, False)]
)
async def test_an_existing_stream_checks_the_expected_version(database: str, expected: int, fits: bool) -> None:
    async with opened(database) as store:
        await store.publish([event("a"), event("a")])
        if fits:
            assert (await store.publish(event("a"), expected_version=expected))[0].version == 3
        else:
            with pytest.raises(WrongExpectedVersion) as caught:
                await store.publish(event("a"), expected_version=expected)
            assert caught.value.actual == 2
            assert await store.stream_version(event("a").stream) == 2


async def test_expected_versions_by_stream(soma_database: str) -> None:
    a, b, c = (event(name) for name in "abc")
    async with opened(soma_database) as store:
        await store.publish([a, event("a")])
        expected = {a.stream: 2, b.stream: NO_STREAM}
        assert [e.version for e in await store.publish([event("a"), b, c], expected_version=expected)] == [3, 1, 1]
        with pytest.raises(WrongExpectedVersion, match="t:default:b"):
            await store.publish([event("a"), event("b")], expected_version={a.stream: 3, b.stream: 5})
        assert await store.stream_version(a.stream) == 3
        with pytest.raises(ValidationError, match="which no event is for"):
            await store.publish(event("a"), expected_version={b.stream: 1})


@pytest.mark.parametrize("expected", [-3, 2**63])
async def test_expected_versions_that_are_none(soma_database: str, expected: int) -> None:
    async with opened(soma_database) as store:
        with pytest.raises(ValidationError, match="not an expected version"):
            await store.publish(event(), expected_version=expected)


@pytest.mark.parametrize("streams", [1, 2])
async def test_a_conflict_leaves_the_transaction_usable_and_writes_nothing(database: str, streams: int) -> None:
    async with opened(database) as store, connected(database) as mine:
        await store.publish(event("0"))
        await mine.execute("CREATE TABLE orders (id int)")
        async with mine.transaction():
            await mine.execute("INSERT INTO orders VALUES (1)")
            with pytest.raises(WrongExpectedVersion):
                batch = [event(str(n), idempotency_key=f"k{n}") for n in range(streams)]
                await store.publish(batch, expected_version=NO_STREAM, tx=mine)
            await mine.execute("INSERT INTO orders VALUES (2)")
            await store.publish(event("0"), expected_version=1, tx=mine)
        assert await mine.fetchval("SELECT count(*) FROM orders") == 2
        assert await store.stream_version(event("0").stream) == 2
        assert await _count(store, "idempotency_keys") == 0
        assert await _count(store, "outbox") == 2
        assert await _count(store, "streams") == 1


async def test_only_one_of_two_expects_the_right_version(database: str) -> None:
    async with opened(database) as store:
        await store.publish(event("a"))

        async def try_to(_: int) -> bool:
            try:
                await store.publish(event("a"), expected_version=1)
            except WrongExpectedVersion as refused:
                assert refused.actual == 2  # noqa: PT017
                return False
            return True

        assert sum(await asyncio.gather(*map(try_to, range(8)))) == 1


async def test_random_keys_at_once_meet_no_deadlock(database: str) -> None:
    """Every call locks its streams in key order, whatever order its events are in."""
    async with opened(database, size=8) as store:
        written: dict[str, int] = {}

        async def write(seed: int) -> None:
            dice = random.Random(seed)
            for number in range(25):
                names = dice.choices("abcdef", k=dice.randint(1, 8))
                keys = [f"{seed}-{number}-{n}" if dice.random() < 0.3 else None for n in range(len(names))]
                batch = [event(n, idempotency_key=key) for n, key in zip(names, keys, strict=True)]
                await store.publish(batch)
                for name in names:
                    written[name] = written.get(name, 0) + 1

        await asyncio.gather(*map(write, range(8)))
        for name, count in written.items():
            events = [e async for e in store.read(event(name).stream, page=50)]
            assert [e.version for e in events] == list(range(1, count + 1))
            assert all(one.timestamp < two.timestamp for one, two in zip(events, events[1:], strict=False))
            assert all(one.position < two.position for one, two in zip(events, events[1:], strict=False))


async def test_a_deadlock_of_the_callers_own_making_is_a_transaction_conflict(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as one, connected(soma_database) as two:
        async with asyncio.timeout(30):
            firsts = [c.transaction() for c in (one, two)]
            for transaction in firsts:
                await transaction.start()
            await store.publish(event("a"), tx=one)
            await store.publish(event("b"), tx=two)
            results = await asyncio.gather(
                store.publish(event("b"), tx=one), store.publish(event("a"), tx=two), return_exceptions=True
            )
            assert sum(isinstance(result, TransactionConflict) for result in results) == 1
            for result, transaction in zip(results, firsts, strict=True):
                await (transaction.commit() if isinstance(result, Published) else transaction.rollback())
        assert await _count(store, "events") == 2


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_serialization_failure_is_a_transaction_conflict(soma_database: str, isolation: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        await store.publish(event("a"))
        with pytest.raises(TransactionConflict):
            async with mine.transaction(isolation=isolation):
                await mine.fetch("SELECT 1 FROM soma.streams")  # takes the snapshot
                await store.publish(event("a"))
                await store.publish(event("a"), tx=mine)
        async with mine.transaction(isolation=isolation):
            assert (await store.publish(event("a"), tx=mine))[0].version == 3
        reader = Reader(store)
        assert len(await reader.drain()) == 3


# -- idempotent publish ------------------------------------------------------------------------------------------------


async def test_the_same_key_again_returns_the_first_record(database: str) -> None:
    async with opened(database) as store:
        first = await store.publish(event("a", idempotency_key="k"))
        second = await store.publish(event("a", idempotency_key="k", payload={"n": 2}))
        assert list(second) == list(first)
        assert second.transaction_id is None
        assert first.transaction_id is not None
        assert await store.outcome(second)
        assert await _count(store, "events") == await _count(store, "outbox") == 1


async def test_the_same_key_at_once_is_recorded_once(database: str) -> None:
    async with opened(database) as store:
        results = await asyncio.gather(*(store.publish(event("a", idempotency_key="k")) for _ in range(8)))
        assert len({result[0].event_id for result in results}) == 1
        assert await _count(store, "events") == 1


async def test_a_key_waits_for_the_transaction_that_holds_it(database: str) -> None:
    async with opened(database) as store, connected(database) as slow, connected(database) as watcher:
        for commits in (False, True):
            transaction = slow.transaction()
            await transaction.start()
            first = await store.publish(event("a", idempotency_key="k"), tx=slow)
            waiter = asyncio.create_task(store.publish(event("b", idempotency_key="k", event_type="thing.done")))
            await _blocked(watcher)
            await (transaction.commit() if commits else transaction.rollback())
            if commits:
                with pytest.raises(IdempotencyKeyReused):
                    await waiter
            else:
                assert (await waiter)[0].event_id != first[0].event_id
                await store.pool.fetch("DELETE FROM soma.idempotency_keys")


async def _blocked(watcher: Any) -> None:
    from tests.waiting import until

    async def blocked() -> Any:
        return await watcher.fetchval(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    await until(blocked)


async def test_a_batch_that_is_partly_known(database: str) -> None:
    async with opened(database) as store:
        [known] = await store.publish(event("a", idempotency_key="k1"))
        batch = [event("a"), event("a", idempotency_key="k1"), event("b", idempotency_key="k2")]
        published = await store.publish(batch)
        assert [(e.aggregate_id, e.version) for e in published] == [("a", 2), ("a", 1), ("b", 1)]
        assert published[1] == known
        assert published.transaction_id is not None
        again = await store.publish(batch[1:])
        assert list(again) == list(published[1:])
        assert await _count(store, "events") == 3


async def test_a_key_that_names_another_event_is_refused(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        await store.publish(event("a", idempotency_key="k"))
        async with mine.transaction():
            for other in (event("b", idempotency_key="k"), event("a", event_type="thing.undone", idempotency_key="k")):
                with pytest.raises(IdempotencyKeyReused, match="'k'"):
                    await store.publish([event("c", idempotency_key="new"), other], tx=mine)
            await store.publish(event("c", idempotency_key="new"), tx=mine)
        elsewhere = await store.publish(event("a", tenant_id="other", idempotency_key="k"))
        assert elsewhere[0].version == 1
        assert await _count(store, "events") == 3


async def test_a_key_whose_event_expired_is_told(soma_database: str) -> None:
    async with opened(soma_database) as store:
        await store.pool.fetch("INSERT INTO soma.idempotency_keys VALUES ('t', 'k', gen_random_uuid(), now())")
        with pytest.raises(AppendError, match="no longer in the log"):
            await store.publish(event("a", idempotency_key="k"))


async def test_one_key_twice_in_one_publish_is_refused(soma_database: str) -> None:
    async with opened(soma_database) as store:
        with pytest.raises(ValidationError, match="same idempotency_key"):
            await store.publish([event("a", idempotency_key="k"), event("b", idempotency_key="k")])
        both = [event("a", idempotency_key="k"), event("a", tenant_id="u", idempotency_key="k")]
        assert len(await store.publish(both)) == 2


async def test_nothing_to_publish(soma_database: str) -> None:
    async with opened(soma_database) as store:
        published = await store.publish([])
        assert list(published) == []
        assert published.transaction_id is None
        with pytest.raises(ValidationError, match="10001 events"):
            await store.publish([event()] * 10_001)


async def test_an_append_waits_for_its_key_only(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as slow, connected(soma_database) as watcher:
        async with asyncio.timeout(20):
            transaction = slow.transaction()
            await transaction.start()
            await store.publish(event("held"), tx=slow)
            async with store.pool.connection() as mine:
                pid = await mine.fetchval("SELECT pg_backend_pid()")
                waiter = asyncio.create_task(store.publish(event("held"), tx=mine))
                await waiting_for_lock(watcher, pid)
                await store.publish(event("free"))
                await transaction.commit()
                assert (await waiter)[0].version == 2


async def test_errors_of_the_callers_own_are_left_alone(soma_database: str) -> None:
    """What a caller does on a pool's connection is not the log's: only the server's state is named for them."""
    async with opened(soma_database) as store:
        for raised in (TimeoutError("mine"), FileNotFoundError("mine"), KeyError("mine")):
            with pytest.raises(type(raised), match="mine"):
                async with store.pool.transaction():
                    raise raised
        with pytest.raises(Exception, match="no_such_table") as caught:
            async with store.pool.transaction() as tx:
                await tx.execute("SELECT * FROM no_such_table")
        assert type(caught.value).__module__.startswith("asyncpg")
        with pytest.raises(ValidationError), translated():
            async with store.pool.connection() as connection:
                await connection.fetch("INSERT INTO soma.streams VALUES ('', 'a', 'a', DEFAULT, 1, 1, now())")
