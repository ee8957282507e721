"""Letters whose next try is not like the first: another set of handlers, a record met again, a server that is away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from soma_common.consumer.metrics import consumer_metrics
from soma_common.consumer.retries import ErrorClass
from soma_common.dlq.models import FullLetter, Status
from soma_common.retry import Backoff
from tests.integration.consumer.conftest import AT_ONCE
from tests.late_cancel import cancelled_too_late
from tests.waiting import until


async def refuse(event: Any, ctx: Any) -> None:
    raise ValueError("it is refused")


async def dead(world: Any, handle: Any = refuse, *types: str, count: int = 1, **given: Any) -> list[FullLetter]:
    """The dead letters of so many new events, each of a key of its own."""
    worker = world.log_worker(handle, *types, **given)
    async with worker:
        await world.publish(count, keys=count)
        await until(lambda: worker.stats().tally.dead == count, within=60)
    letters: list[FullLetter] = await world.letters()
    return letters


async def until_status(world: Any, letter: FullLetter, *wanted: Status, seen: int = 0) -> FullLetter:
    """The letter, once it has one of these statuses and so many tries behind it."""
    found: list[FullLetter] = []

    async def there() -> bool:
        found[:] = [await world.dlq.show(letter.letter.letter_id)]
        return found[0].letter.status in wanted and found[0].letter.attempts > seen

    await until(there, within=60, what=f"the letter to be {wanted}")
    return found[0]


async def test_a_letter_that_no_handler_takes_any_more_is_not_resolved(world: Any, apply: Any) -> None:
    """It was never applied. A worker of an older or newer version must not settle what another one would apply."""
    (letter,) = await dead(world)
    assert await world.dlq.retry_event(letter.letter.letter_id)
    async with world.log_worker(apply, "order.shipped"):
        after = await until_status(world, letter, Status.DEAD, Status.RESOLVED, seen=1)
    assert after.letter.status is Status.DEAD
    assert after.letter.error_type == "soma_common.errors.UnhandledType"
    assert await world.count() == 0
    assert await world.dlq.retry_event(letter.letter.letter_id)
    async with world.log_worker(apply):
        await until_status(world, letter, Status.RESOLVED)
    assert await world.count() == 1


async def test_a_refused_type_stays_refused_until_it_has_a_handler(world: Any, apply: Any, settings: Any) -> None:
    strict = settings(unknown="refuse")
    (letter,) = await dead(world, apply, "order.shipped", settings=strict)
    assert await world.dlq.retry_event(letter.letter.letter_id)
    async with world.log_worker(apply, "order.shipped", settings=strict):
        after = await until_status(world, letter, Status.DEAD, Status.RESOLVED, seen=1)
    assert after.letter.status is Status.DEAD


async def test_types_without_a_handler_are_counted_either_way(world: Any, apply: Any, settings: Any) -> None:
    """Refused ones once, when they become letters: what waits behind one, and what is met again, is none of them."""

    async def fail(event: Any, ctx: Any) -> None:
        raise ValueError("it is not for want of a handler")

    await world.publish(4, keys=4)
    await world.publish(1, keys=1, start=4, event_type="order.shipped")  # behind a refused one of its key
    await world.publish(1, keys=1, start=5, aggregate_type="other", event_type="order.shipped")
    for unknown, refused, skipped in (("refuse", 4, 0), ("ignore", 0, 4)):
        worker = world.log_worker(fail, "order.shipped", consumer=unknown, settings=settings(unknown=unknown))
        async with worker:
            await until(lambda worker=worker: worker.stats().tally.settled == 6, within=60)
        tally = worker.stats().tally
        assert (tally.refused, tally.skipped) == (refused, skipped)
        assert (tally.dead, tally.blocked) == (refused + (1 if refused else 2), 1 if refused else 0)
        (sample,) = [m for m in consumer_metrics([worker.stats()]) if m.name == "soma_consumer_refused_total"]
        assert sample.value == refused


FORGET = """
DELETE FROM soma.dead_letter_history; DELETE FROM soma.dead_letters; DELETE FROM soma.dead_sequences;
DELETE FROM soma.inbox; DELETE FROM soma.shards
"""


async def test_a_record_that_is_met_again_after_it_was_captured_without_its_event(world: Any, apply: Any) -> None:
    """Whoever captured it could not read it; met again it can be read, and waits behind its own letter, which must
    apply it. So it is with a record that could not be decoded, and is redelivered to a newer version that can.
    """
    (letter,) = await dead(world)
    async with world.pool.connection() as connection:
        await connection.execute(FORGET)  # the consumer begins anew: it will meet the record once more
    assert await world.dlq.capture_failed_event("billing", letter.record, ValueError("it was not understood"))
    worker = world.log_worker(apply)
    async with worker:
        await until(lambda: worker.stats().tally.blocked == 1, within=60)
        (letter,) = await world.letters()
        assert await world.dlq.retry_event(letter.letter.letter_id)
        await until_status(world, letter, Status.RESOLVED)
    assert await world.count() == 1


class ServerDown(Exception):
    """What a handler needs is away."""


async def test_letters_whose_server_is_away_do_not_hold_up_the_others(world: Any, apply: Any, settings: Any) -> None:
    """They have waited longest, and there are more of them than this worker re-drives at once."""
    down = True

    async def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] < 3 and down:
            raise ServerDown("the mail server is away")
        await apply(event, ctx)

    # Lanes park side by side, in any order: the one that can be applied is the event n = 3, not the last letter.
    letters = sorted(await dead(world, count=4), key=lambda letter: orjson.loads(letter.value or b"")["payload"]["n"])
    for letter in letters:
        assert await world.dlq.retry_event(letter.letter.letter_id)
    retry = replace(AT_ONCE, classes={ServerDown: ErrorClass.INFRASTRUCTURE}, away=Backoff(base=0.2, maximum=1.0))
    async with world.log_worker(handle, settings=settings(retry=retry, redrives=1)):
        await until_status(world, letters[3], Status.RESOLVED)
        waiting = [await world.dlq.show(letter.letter.letter_id) for letter in letters[:3]]
        assert [letter.letter.status for letter in waiting] == [Status.REDRIVING] * 3
        down = False
        for letter in letters[:3]:
            await until_status(world, letter, Status.RESOLVED)
    assert await world.count() == 4


@pytest.mark.parametrize("field", ["tenant_id", "service_id", "idempotency_key", "aggregate_id"])
async def test_an_edit_cannot_make_another_event_of_a_letter(world: Any, apply: Any, field: str) -> None:
    """Under another name it would be applied beside the inbox row of its own; under another key, out of order."""
    (letter,) = await dead(world)
    value = orjson.loads(letter.record.value) | {field: "another"}
    assert await world.dlq.retry_event(letter.letter.letter_id, transform=lambda _: value)
    async with world.log_worker(apply):
        after = await until_status(world, letter, Status.DEAD, Status.RESOLVED, seen=1)
        assert after.letter.status is Status.DEAD
        assert field in (after.message or "")
        value = orjson.loads(letter.record.value) | {"payload": {"n": 7}}
        assert await world.dlq.retry_event(letter.letter.letter_id, transform=lambda _: value)
        await until_status(world, letter, Status.RESOLVED)
    assert [row[3] for row in await world.effects()] == [7]


async def test_a_sequence_leased_while_the_worker_stops_is_given_back(world: Any, apply: Any) -> None:
    """The next worker need not wait for the end of that lease, and nobody counts it as a worker's death."""
    (letter,) = await dead(world)
    slow = cancelled_too_late(world.pool, "soma.dead_sequences", "NEW.leases > OLD.leases", seconds=3.0)
    async with slow as under_way:
        assert await world.dlq.retry_event(letter.letter.letter_id)
        async with world.log_worker(apply):
            await until(under_way, what="the lease is under way")
        left = await world.pool.fetch("SELECT lease_owner, leases FROM soma.dead_sequences")
        assert [tuple(row) for row in left] == [(None, 0)]
    async with world.log_worker(apply):
        await until_status(world, letter, Status.RESOLVED)
