"""Records of strangers whose names are longer than the inbox can hold."""

from __future__ import annotations

import secrets
from typing import Any

import orjson
import pytest

from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.payloads import to_json
from tests.waiting import until

LONG = secrets.token_hex(20_000)  # random, because PostgreSQL would compress anything else


@pytest.mark.parametrize("name", ["idempotency_key", "tenant_id", "service_id"])
async def test_such_a_record_becomes_a_letter_and_the_others_are_applied(world: Any, topic: Any, name: str) -> None:
    (model,) = await world.publish(1)
    foreign = orjson.loads(JsonCodec().encode(model, to_json("payload", model.payload, 10**6))) | {name: LONG}
    await topic.send(key=kafka_key(model.stream)[0] + b"!", value=orjson.dumps(foreign))
    events = await world.publish(20, start=1)
    await topic.produce(events)
    async with world.worker(topic.source(world.pool)) as worker:
        await world.applied(20)
        await until(lambda: worker.stats().tally.dead == 1)
    (letter,) = await world.letters()
    assert orjson.loads(letter.record.value) == foreign
    await world.check(events)
