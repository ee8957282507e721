"""Copies of dead letters in Kafka, as a stock consumer reads them: byte for byte, with headers in three styles."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from soma_common import DeployMode, Soma, SomaConfig
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.mirror import HeaderStyle, Mirror, MirrorSettings
from soma_common.dlq.models import RawRecord, RedrivePolicy
from soma_common.dlq.store import DeadLetters
from soma_common.errors import ConfigurationError, LeaseLost
from soma_common.inbox import Inbox, LaneCount
from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings
from soma_common.outbox.publishing import TopicRefused
from soma_common.outbox.relay import Relay
from soma_common.outbox.settings import RelaySettings
from soma_common.testing.backends import KafkaHandle
from tests.dlq_support import Desk, failure, undelivered
from tests.waiting import until

PATIENCE = 90.0
AT_ONCE = RetryPolicy(tries=1, parked=RedrivePolicy(tries=0))


class Copies:
    """A topic of copies, and a relay that fills it."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.bootstrap, self.topic = bootstrap, topic
        self.publishers = KafkaPublishers(PublisherSettings(bootstrap=bootstrap))

    def settings(self, style: HeaderStyle = HeaderStyle.SOMA) -> ConsumerSettings:
        return ConsumerSettings(retry=AT_ONCE, redrive_every=0.05, mirror=MirrorSettings(self.topic, style))

    def relay(self, pool: Any, **given: Any) -> Relay:
        return Relay(pool, self.publishers, name=self.topic, settings=RelaySettings(most_idle=0.05), **given)

    async def read(self, count: int) -> list[Any]:
        """So many records, in order of their partitions and offsets; AssertionError when they do not come."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await consumer.start()
        try:
            consumer.assign([TopicPartition(self.topic, number) for number in range(3)])
            found: list[Any] = []

            async def enough() -> bool:
                polled = await consumer.getmany(timeout_ms=200)
                found.extend(record for records in polled.values() for record in records)
                return len(found) >= count

            await until(enough, within=PATIENCE, what=f"{count} copies")
            polled = await consumer.getmany(timeout_ms=500)
            found.extend(record for records in polled.values() for record in records)
            return sorted(found, key=lambda r: (r.partition, r.offset))
        finally:
            await consumer.stop()


@pytest.fixture
async def copies(soma_kafka: KafkaHandle, soma_topic: Callable[..., str]) -> AsyncIterator[Copies]:
    one = Copies(soma_kafka.bootstrap, soma_topic("soma.copies", partitions=3))
    yield one
    await one.publishers.close()


async def refuse(event: Any, ctx: Any) -> None:
    if event.payload.get("n", 0) < 0:
        raise ValueError("a negative number")


async def test_a_stock_consumer_reads_the_record_and_what_went_wrong(world: Any, topic: Any, copies: Copies) -> None:
    hostile = [
        {"value": b"\x00\xff no event", "key": b"\xfe\x00", "headers": [("h", b"\xff"), ("h", b""), ("n", None)]},
        {"value": b"", "key": b""},
        {"value": b"without a key", "key": None},
        {"value": None, "key": b"tombstone"},
        {"value": b"a key longer than an entry of an index", "key": random.Random(1).randbytes(5000)},
    ]
    events = await world.publish(3, start=-1)
    async with copies.relay(world.pool), world.worker(topic.source(world.pool), refuse, settings=copies.settings()):
        for record in hostile:
            await topic.send(**record)
        await topic.produce(events)
        found = await copies.read(6)
    assert len(found) == 6
    letters = {str(letter.letter.letter_id): letter for letter in await world.letters()}
    assert len(letters) == 6
    by_id = {dict(record.headers)["soma_dlq_letter_id"].decode(): record for record in found}
    assert by_id.keys() == letters.keys()
    for name, record in by_id.items():
        letter = letters[name]
        original = letter.record
        assert (record.key, record.value) == (original.key, original.value)
        assert tuple(record.headers[: len(original.headers)]) == original.headers
        told = dict(record.headers[len(original.headers) :])
        assert told["soma_dlq_topic"].decode() == topic.name
        assert (int(told["soma_dlq_partition"]), int(told["soma_dlq_offset"])) == (original.partition, original.offset)
        assert told["soma_dlq_stage"].decode() == letter.letter.stage
        assert told["soma_dlq_error_message"].decode() == letter.message
        assert told["soma_dlq_fingerprint"].decode() == letter.letter.fingerprint
        assert (told["soma_dlq_status"], told["soma_dlq_consumer"]) == (b"dead", b"billing")
    originals = {(letter.record.key, letter.record.value) for letter in letters.values()}
    assert {(record["key"], record["value"]) for record in hostile} <= originals
    odd = next(record for record in found if record.key == b"\xfe\x00")
    assert odd.headers[:3] == (("h", b"\xff"), ("h", b""), ("n", None))


@pytest.mark.parametrize("style", [HeaderStyle.SPRING, HeaderStyle.CONNECT])
async def test_the_headers_of_others(world: Any, topic: Any, copies: Copies, style: HeaderStyle) -> None:
    async with (
        copies.relay(world.pool, exactly_once=True),
        world.worker(topic.source(world.pool), refuse, settings=copies.settings(style)),
    ):
        await topic.produce(await world.publish(1, start=-1))
        (record,) = await copies.read(1)
    (letter,) = await world.letters()
    told, original = dict(record.headers), letter.record
    if style is HeaderStyle.SPRING:
        assert told["kafka_dlt-original-topic"].decode() == topic.name
        assert told["kafka_dlt-original-partition"] == struct.pack(">i", original.partition)
        assert told["kafka_dlt-original-offset"] == struct.pack(">q", original.offset)
        assert told["kafka_dlt-original-timestamp"] == struct.pack(">q", round(original.timestamp.timestamp() * 1000))
        assert told["kafka_dlt-original-timestamp-type"] == b"CreateTime"
        assert told["kafka_dlt-original-consumer-group"] == b"billing"
        assert told["kafka_dlt-exception-fqcn"] == b"ValueError"
        assert told["kafka_dlt-exception-message"] == b"a negative number"
        assert b"Traceback" in told["kafka_dlt-exception-stacktrace"]
    else:
        assert told["__connect.errors.topic"].decode() == topic.name
        assert told["__connect.errors.partition"] == b"%d" % original.partition
        assert told["__connect.errors.offset"] == b"%d" % original.offset
        assert told["__connect.errors.stage"] == b"TASK_PUT"
        assert told["__connect.errors.exception.class.name"] == b"ValueError"
        assert told["__connect.errors.exception.message"] == b"a negative number"
    assert not any(name.startswith("soma_dlq_") and name != "soma_dlq_letter_id" for name in told)


async def test_what_is_rolled_back_has_no_copy_and_what_is_known_no_second(world: Any) -> None:
    desk = await Desk.open(world.pool)
    letters = DeadLetters(world.pool, Inbox(desk.consumer), "x", consumer="billing", mirror=Mirror(MirrorSettings()))
    one = undelivered("a")
    with pytest.raises(LeaseLost):
        await letters.park(one, failure(), attempts=1, lane=LaneCount(12345, 7))
    assert await world.pool.fetch("SELECT FROM soma.outbox") == []
    assert await world.letters() == []
    for _ in range(3):
        await letters.park(one, failure(), attempts=1)
    rows = await world.pool.fetch("SELECT topic, event_id FROM soma.outbox")
    assert [(row[0], str(row[1])) for row in rows] == [
        ("soma.stack.dlq", str((await world.letters())[0].letter.letter_id))
    ]


async def test_a_letter_of_the_topic_of_copies_is_not_copied(world: Any) -> None:
    dlq = DLQHandler(world.pool, who="ann", mirror=MirrorSettings("t.dlq"))
    for topic in ("t.dlq", "t"):
        record = RawRecord(topic=topic, partition=0, offset=1, key=b"k", value=b"\xff")
        assert await dlq.capture_failed_event("billing", record, ValueError("no"))
    (row,) = await world.pool.fetch("SELECT topic, headers FROM soma.outbox")
    assert row[0] == "t.dlq"
    assert "soma_dlq_topic" in row[1]


async def test_copies_of_a_key_keep_its_order(world: Any, topic: Any, copies: Copies) -> None:
    async with copies.relay(world.pool):
        dlq = DLQHandler(world.pool, who="ann", mirror=MirrorSettings(copies.topic))
        for offset in range(20):
            record = RawRecord(topic="t", partition=0, offset=offset, key=b"k%d" % (offset % 2), value=b"v")
            await dlq.capture_failed_event("billing", record, ValueError("no"))
        found = await copies.read(20)
    offsets: dict[bytes, list[int]] = {}
    for record in found:
        offsets.setdefault(record.key, []).append(int(dict(record.headers)["soma_dlq_offset"]))
    assert offsets == {b"k0": list(range(0, 20, 2)), b"k1": list(range(1, 20, 2))}


@pytest.mark.parametrize("topic_name", ["", "a b", "ä", "x" * 250, "a/b", "a\0b"])
def test_a_topic_that_kafka_would_refuse(topic_name: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a topic"):
        MirrorSettings(topic_name)


def test_a_style_that_nobody_knows() -> None:
    with pytest.raises(ConfigurationError, match="use soma, spring, connect"):
        MirrorSettings(style="xml")  # type: ignore[arg-type]


def test_standalone_has_no_topic_of_copies() -> None:
    with pytest.raises(ConfigurationError, match="standalone"):
        Soma(SomaConfig(), settings=ConsumerSettings(mirror=MirrorSettings()))


async def test_the_application_makes_the_topic(
    world: Any, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]
) -> None:
    name = f"{soma_topic()}.dlq"
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, service_id="tests", postgres_dsn=world.dsn, kafka_bootstrap=soma_kafka.bootstrap,
        topic=soma_topic(),
    )  # fmt: skip
    async with Soma(config, settings=ConsumerSettings(mirror=MirrorSettings(name))):
        publishers = KafkaPublishers(PublisherSettings(bootstrap=soma_kafka.bootstrap))

        async def three() -> bool:
            with suppress(TopicRefused):  # a moment ago it was not there
                return await publishers.partitions(name) == 3
            return False

        try:
            await until(three, within=PATIENCE)
        finally:
            await publishers.close()
