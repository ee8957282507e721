"""Letters of a consumer of Avro, edited by people, who write JSON."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from soma_common.dlq.models import FullLetter, Status
from soma_common.errors import ValidationError
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.payloads import Payload, to_json
from soma_common.kafka.source import KafkaSource
from soma_common.schemas.avro import event_schemas, schema_text
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.schemas.table import SchemaRef, SchemaTable
from tests.integration.consumer.test_redrive_unusual import refuse, until_status
from tests.waiting import until


class Paid(Payload, event_type="order.paid"):
    n: int


def codec() -> AvroCodec:
    table = SchemaTable()
    for number, (key, schema) in enumerate(event_schemas([Paid]).items(), 1):
        table.learn(SchemaRef("content", number), schema_text(schema))
        table.bind(*key, number)
    return AvroCodec(table)


def source(world: Any, topic: Any) -> KafkaSource:
    return KafkaSource(world.pool, topic.source(world.pool).settings, codec())


async def dead(world: Any, topic: Any) -> FullLetter:
    """The dead letter of an event that came as Avro."""
    (event,) = await world.publish(1)
    value = codec().encode(event, to_json("payload", event.payload, 1000))
    assert value[0] == 0
    headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
    await topic.send(value=value, key=kafka_key(event.stream)[0], headers=headers)
    worker = world.worker(source(world, topic), refuse)
    async with worker:
        await until(lambda: worker.stats().tally.dead == 1, within=60)
    (letter,) = await world.letters()
    assert letter.record.value == value
    return letter


async def test_an_edited_letter_of_avro_may_be_the_envelope_as_json(world: Any, topic: Any, apply: Any) -> None:
    letter = await dead(world, topic)
    letter_id = letter.letter.letter_id
    worker = world.worker(source(world, topic), apply)

    async def envelope(given: FullLetter) -> dict[str, Any]:
        event = await worker.source.decode(given.record)
        value: dict[str, Any] = orjson.loads(JsonCodec().encode(event, orjson.dumps(event.payload | {"n": 7})))
        return value

    async def stranger(given: FullLetter) -> dict[str, Any]:
        return await envelope(given) | {"aggregate_id": "another"}

    async with worker:
        assert await world.dlq.retry_event(letter_id, transform=stranger)
        after = await until_status(world, letter, Status.DEAD, Status.RESOLVED, seen=1)
        assert after.letter.status is Status.DEAD
        assert "its aggregate_id is 'another'" in (after.message or "")

        assert await world.dlq.retry_event(letter_id, transform=envelope)
        after = await until_status(world, letter, Status.RESOLVED, Status.DEAD, seen=2)
    assert after.letter.status is Status.RESOLVED, after.message
    assert after.record.value == letter.record.value
    assert [row[3] for row in await world.effects()] == [7]


async def test_a_transform_may_be_told_to_be_raw(world: Any) -> None:
    """The error named a way out that the method did not have."""
    worker = world.log_worker(refuse)
    async with worker:
        await world.publish(1)
        await until(lambda: worker.stats().tally.dead == 1, within=60)
    (letter,) = await world.letters()
    letter_id = letter.letter.letter_id
    with pytest.raises(ValidationError, match="is not JSON") as error:
        await world.dlq.retry_event(letter_id, transform=lambda _: b"\0\1")
    assert "pass raw" in str(error.value.cure)
    assert await world.dlq.retry_event(letter_id, transform=lambda _: b"\0\1", raw=True)
    assert (await world.dlq.show(letter_id)).edited_value == b"\0\1"
