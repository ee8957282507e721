"""What the relay cannot publish is a dead letter like any other: found, tried again and given up by the same verbs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import Letter, RawRecord
from soma_common.errors import LetterChanged, ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.events.store import ALL_TENANTS
from soma_common.outbox.parking import list_parked
from soma_common.sql.loader import blocks
from soma_common.testing.backends import KafkaHandle
from soma_common.testing.lane.kafka_wire import Topic
from tests.integration.relay.lab import RelayProcess, World, check, make
from tests.sessions import WAITING_LOCKS
from tests.waiting import until

MODES = pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])


def desk(lab: World) -> DLQHandler:
    return DLQHandler(lab.pool, who="ann")


async def letters(lab: World, **conditions: Any) -> list[Letter]:
    given = {"tenant_id": ALL_TENANTS, "consumer": f"relay:{lab.name}"} | conditions
    return list((await desk(lab).list_dlq_events(limit=1000, **given)).letters)


async def stand(lab: World, *wanted: str) -> list[Letter]:
    """The letters in order, once they have these statuses."""

    async def there() -> list[Letter]:
        found = await letters(lab)
        return found if [one.status.value for one in found] == list(wanted) else []

    found: list[Letter] = await until(there, what=f"letters are {wanted}")
    return found


async def consistent(lab: World) -> bool:
    """A row is parked if and only if its letter is open, and blocked if and only if it has no reason."""
    sql = """
        SELECT count(*) FROM soma.outbox_parked p
        FULL JOIN (SELECT l.* FROM soma.dead_letters l WHERE l.partition = -1
                   AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')) l
            ON l.topic = p.topic AND l.record_offset = p.position
        WHERE p.position IS NULL OR l.letter_id IS NULL OR (p.reason IS NULL) <> (l.status = 'blocked')
           OR (l.status = 'redriving') <> (p.wanted AND p.reason IS NOT NULL)
    """
    return bool((await lab.pool.fetch(sql))[0][0] == 0)


async def three_of_a_key(lab: World, soma_topic: Callable[..., str]) -> list[RecordedEvent]:
    """A row that is too large and two behind it."""
    lab.topic = soma_topic(max_message_bytes="4000")
    large = await lab.store.publish(make("k1", 0, payload={"text": noise(9000)}))
    return [*large, *await lab.store.publish([make("k1", 1), make("k1", 2)])]


def noise(size: int) -> str:
    return "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=size))


async def allow(lab: World, size: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=lab.bootstrap)
    await admin.start()
    try:
        settings = {"max.message.bytes": str(size)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, lab.topic, settings)])
    finally:
        await admin.close()


@MODES
async def test_a_refused_row_is_a_letter_until_it_is_sent(
    lab: World, soma_topic: Callable[..., str], exactly_once: bool
) -> None:
    async with lab.relay(exactly_once=exactly_once):
        events = await three_of_a_key(lab, soma_topic)
        found = await stand(lab, "dead", "blocked", "blocked")
        assert [one.event.event_id for one in found] == [event.event_id for event in events]
        head = found[0]
        assert (head.stage, head.error_type, head.attempts) == ("publish", "MessageSizeTooLargeError", 1)
        assert (head.event.tenant_id, head.offset) == ("t", events[0].position)
        assert await letters(lab, tenant_id="t", stage="publish") == [head]
        assert await letters(lab, tenant_id="another") == []
        assert (await letters(lab, trace_id=events[0].trace.trace_id))[0] == head
        full = await desk(lab).show(head.letter_id)
        (row,) = await lab.pool.fetch("SELECT key, value FROM soma.outbox_parked WHERE position = $1", head.offset)
        assert (full.record.key, full.record.value) == (row[0], row[1])
        assert full.record.digest == RawRecord(topic="", partition=0, offset=0, key=row[0], value=row[1]).digest
        headers = dict(full.record.headers)
        assert headers["event_id"] == str(events[0].event_id).encode()
        assert headers["soma_position"] == b"%d" % events[0].position
        (group,) = await desk(lab).summary(tenant_id=ALL_TENANTS, stage="publish")
        assert (group.count, group.fingerprint) == (1, head.fingerprint)

        # Asked while the cause is there; whichever of the key's letters is named.
        assert await desk(lab).retry_event(found[2].letter_id, why="hoping")
        found = await stand(lab, "dead", "blocked", "blocked")
        found = [one for one in await until(lambda: tried(lab, 2)) if one]
        assert await consistent(lab)

        await allow(lab, 1_000_000)
        assert await desk(lab).retry_many(consumer=f"relay:{lab.name}", tenant_id=ALL_TENANTS, why="mended") == 1
        await stand(lab, "resolved", "resolved", "resolved")
        lab.journal.committed += events
        await lab.write(20, keys=3)
        assert check(lab.journal, await lab.arrived()) == 0
    told = [(entry.who, entry.what) for entry in await desk(lab).history(head.letter_id)]
    relay = f"relay:{lab.name}"
    assert told == [(relay, "dead"), ("ann", "redriving"), (relay, "dead"), ("ann", "redriving"), (relay, "resolved")]
    assert (await desk(lab).history(head.letter_id))[3].why == "mended"


async def tried(lab: World, attempts: int) -> list[Letter]:
    found = await letters(lab)
    return found if found[0].attempts == attempts and found[0].status == "dead" else []


@MODES
async def test_a_letter_that_is_given_up_lets_its_key_go(
    lab: World, soma_topic: Callable[..., str], exactly_once: bool
) -> None:
    async with lab.relay(exactly_once=exactly_once):
        _, *behind = await three_of_a_key(lab, soma_topic)
        head = (await stand(lab, "dead", "blocked", "blocked"))[0]
        with pytest.raises(ValidationError, match="recorded in the log"):
            await desk(lab).edit(await desk(lab).show(head.letter_id), {"text": "short"})
        assert await desk(lab).discard(head.letter_id, "nobody needs it")
        assert not await desk(lab).discard(head.letter_id, "nobody needs it")
        assert not await desk(lab).retry_event(head.letter_id)
        await stand(lab, "discarded", "resolved", "resolved")
        later = await lab.store.publish([make("k1", 3), make("k1", 4)])
        wanted = [str(event.event_id) for event in (*behind, *later)]
        assert [record.event_id for record in await lab.arrived(ids=wanted)] == wanted
        assert await consistent(lab)


async def test_the_only_row_of_a_key_is_given_up_and_the_key_goes_on(
    lab: World, soma_topic: Callable[..., str]
) -> None:
    """The relay still remembers the key as parked: what comes next is parked behind nothing, and must not stay so."""
    lab.topic = soma_topic(max_message_bytes="4000")
    async with lab.relay():
        await lab.store.publish(make("k1", 0, payload={"text": noise(9000)}))
        (head,) = await stand(lab, "dead")
        await desk(lab).discard(head.letter_id, "nobody needs it")
        later = [event for n in range(1, 4) for event in await lab.store.publish(make("k1", n))]
        wanted = [str(event.event_id) for event in later]
        assert [record.event_id for record in await lab.arrived(ids=wanted)] == wanted
        assert await list_parked(lab.pool, name=lab.name) == []


async def test_a_row_that_is_being_sent_is_not_given_up(lab: World, soma_topic: Callable[..., str]) -> None:
    async with lab.relay():
        await three_of_a_key(lab, soma_topic)
        head, follower, _ = await stand(lab, "dead", "blocked", "blocked")
    # Nobody relays now: the try stays asked for.
    assert await desk(lab).retry_event(head.letter_id)
    assert not await desk(lab).retry_event(head.letter_id)
    assert (await letters(lab))[0].status == "redriving"
    for one in (head, follower):
        with pytest.raises(LetterChanged, match="being sent"):
            await desk(lab).discard(one.letter_id, "too late")
    assert await consistent(lab)


async def test_a_row_that_is_parked_while_its_head_is_given_up_does_not_stay(
    lab: World, soma_topic: Callable[..., str]
) -> None:
    async with lab.relay():
        events = await three_of_a_key(lab, soma_topic)
        found = await stand(lab, "dead", "blocked", "blocked")
    reader = f"relay:{lab.name}"
    again = """
        INSERT INTO soma.outbox_parked (reader, position, topic, key, key_hash, event_id, event_type, version, "timestamp",
                                        value, headers, reason, parked_at)
        SELECT reader, position + 1000, topic, key, key_hash, event_id, event_type, version, "timestamp", value, headers,
               NULL, parked_at FROM soma.outbox_parked WHERE position = $1
    """
    # The two rows behind it are sent already, in this story.
    await lab.pool.fetch("DELETE FROM soma.outbox_parked WHERE reason IS NULL AND reader = $1", reader)
    async with lab.pool.connection() as giving_up, lab.pool.connection() as parking:
        transaction = giving_up.transaction()
        await transaction.start()
        assert await giving_up.fetchval("SELECT soma.discard_any($1, 'ann', 'x')", found[0].letter_id) == "dead"
        parked = asyncio.create_task(parking.execute(again, events[0].position))

        async def waits() -> bool:
            sql = f"SELECT count(*) FROM {WAITING_LOCKS} WHERE locktype = 'advisory'"
            return bool((await lab.pool.fetch(sql))[0][0])

        # It read its row before; what it must wait for is the look for an earlier one.
        await until(waits)
        await transaction.commit()
        await parked
    rows = await list_parked(lab.pool, name=lab.name)
    assert [(row.position, row.wanted) for row in rows] == [(events[0].position + 1000, True)]


@pytest.mark.parametrize("headers", ['{"a": "\\u0000"}', "no json", "[1, 2]", '{"a": {"b": null}}', "null"])
async def test_odd_headers_do_not_keep_a_row_from_being_parked(lab: World, headers: str) -> None:
    lab.topic = f"{lab.topic}.missing"
    await lab.store.publish(make("k1", 1))
    await lab.pool.fetch("UPDATE soma.outbox SET headers = $1", headers)
    async with lab.relay():
        (one,) = await stand(lab, "dead")
    full = await desk(lab).show(one.letter_id)
    assert [name for name, _ in full.record.headers][-4:] == ["event_id", "event_type", "soma_version", "soma_position"]


@MODES
async def test_letters_and_rows_agree_after_kills(
    lab: World, soma_kafka: KafkaHandle, spawn: Callable[..., RelayProcess], exactly_once: bool
) -> None:
    missing = f"{lab.topic}.later"
    options = ("--exactly-once" if exactly_once else "--at-least-once",)
    lost: list[RecordedEvent] = []
    for turn in range(4):
        relay = spawn(lab, *options)
        lost += await lab.store.publish([make(f"k{n % 5}", n, metadata={"topic": missing}) for n in range(20)])
        await lab.write(20)

        async def some(least: int = len(lost) - 10) -> bool:
            return len(await list_parked(lab.pool, name=lab.name, limit=1000)) >= least

        await until(some, within=90)
        relay.kill()
        assert await consistent(lab)
        await desk(lab).retry_many(consumer=f"relay:{lab.name}", tenant_id=ALL_TENANTS)
        assert await consistent(lab), turn
    soma_kafka.create_topic(Topic(missing, partitions=2, config={}))
    spawn(lab, *options)

    async def asked_until_sent() -> bool:
        await desk(lab).retry_many(consumer=f"relay:{lab.name}", tenant_id=ALL_TENANTS)
        return not await list_parked(lab.pool, name=lab.name) and len(await letters(lab)) == len(lost)

    await until(asked_until_sent, within=120)
    found = await letters(lab)
    assert {one.status.value for one in found} == {"resolved"}
    assert {one.event.event_id for one in found} == {UUID(str(event.event_id)) for event in lost}
    assert await consistent(lab)
    lab.topic = missing
    seen: dict[bytes, list[int]] = {}
    for record in sorted(await lab.arrived(ids=[str(e.event_id) for e in lost]), key=lambda r: (r.partition, r.offset)):
        position = int(dict(record.headers)["soma_position"])
        if position not in seen.setdefault(record.key, []):
            seen[record.key].append(position)
    assert sum(map(len, seen.values())) == len(lost)
    assert all(positions == sorted(positions) for positions in seen.values())


async def test_the_triggers_find_letters_by_their_record(lab: World) -> None:
    """With many letters and many rows; what the triggers do is a join on the key of the record."""
    fill = """
        INSERT INTO soma.consumers (name) VALUES ('relay:big');
        INSERT INTO soma.outbox_parked (reader, position, topic, key, key_hash, event_id, event_type, version, "timestamp",
                                        value, headers, reason, parked_at)
        SELECT 'relay:big', n, 't' || n % 7, convert_to('k' || n % 500, 'UTF8'), n, gen_random_uuid(), 'e', 1, now(), 'v',
               '{}', CASE WHEN n <= 3500 THEN 'no' END, now() FROM generate_series(1, 20000) n;
        ANALYZE soma.dead_letters, soma.outbox_parked;
    """
    async with lab.pool.connection() as connection:
        await connection.execute(fill)
        assert await connection.fetchval("SELECT count(*) FROM soma.dead_letters") == 20_000
        plan = await connection.fetchval(
            """
            EXPLAIN (FORMAT JSON) UPDATE soma.dead_letters l SET status = 'resolved'
            FROM (SELECT * FROM soma.outbox_parked WHERE position = ANY ('{5,6,7}') AND reader = 'relay:big') g
            JOIN soma.consumers c ON c.name = g.reader
            WHERE l.consumer_id = c.consumer_id AND l.topic = g.topic AND l.partition = -1
              AND l.record_offset = g.position AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
            """
        )
        text = json.dumps(json.loads(plan))
        assert "dead_letters_record_key" in text, text
        assert (
            '"Seq Scan", "Parallel Aware": false, "Async Capable": false, "Relation Name": "dead_letters"' not in text
        )
    began = asyncio.get_running_loop().time()
    assert await desk(lab).retry_many(consumer="relay:big", tenant_id=ALL_TENANTS, stage="publish", most=1) >= 1
    assert asyncio.get_running_loop().time() - began < 30


async def test_a_row_of_a_key_that_is_being_sent_is_not_given_up(lab: World) -> None:
    """The relay sends whole keys, so also rows that were parked behind the others since the try was asked for."""
    insert = """
        INSERT INTO soma.outbox_parked (reader, position, topic, key, key_hash, event_id, event_type, version, "timestamp",
                                        value, headers, reason, parked_at)
        VALUES ('relay:r', $1, 't', 'k', 0, gen_random_uuid(), 'e', 1, now(), 'v', '{}', $2, now())
    """
    async with lab.pool.connection() as one:
        await one.execute(insert, 1, "no")
    (head,) = await letters(lab, consumer="relay:r")
    assert await desk(lab).retry_event(head.letter_id)
    async with lab.pool.connection() as one:
        await one.execute(insert, 2, None)
        taken = await one.fetch(blocks("outbox")["wanted"], "relay:r", [0], 10)
    assert [row[0] for row in taken] == [1, 2]  # both are in the relay's hands
    behind = (await letters(lab, consumer="relay:r"))[1]
    with pytest.raises(LetterChanged, match="being sent"):
        await desk(lab).discard(behind.letter_id, "too late")


async def test_the_runtime_role_may_park_try_and_give_up(lab: World) -> None:
    role = f"soma_{abs(hash(lab.name)) % 10**9}"
    insert = """
        INSERT INTO soma.outbox_parked (reader, position, topic, key, key_hash, event_id, event_type, version, "timestamp",
                                        value, headers, reason, parked_at)
        VALUES ('relay:r', $1, 't', $2, 0, gen_random_uuid(), 'e', 1, now(), 'v', '{}', 'no', now())
    """
    async with lab.pool.connection() as one:
        await one.execute(f"CREATE ROLE {role}; SELECT soma.grant_runtime('{role}'); SET ROLE {role}")
        try:
            await one.execute(insert, 1, b"a")
            await one.execute(insert, 2, b"b")
            first, second = [r[0] for r in await one.fetch("SELECT letter_id FROM soma.dead_letters ORDER BY place")]
            assert len(await one.fetch("SELECT soma.redrive_any(ARRAY[$1::uuid], 'ann', 'x')", first)) == 1
            assert await one.fetchval("SELECT soma.discard_any($1, 'ann', 'x')", second) == "dead"
            await one.execute("DELETE FROM soma.outbox_parked WHERE position = 1")
            statuses = [row[0] for row in await one.fetch("SELECT status FROM soma.dead_letters ORDER BY place")]
            assert statuses == ["resolved", "discarded"]
        finally:
            await one.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
