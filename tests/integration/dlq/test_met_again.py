"""A record whose letter knows no event is met again, and can be read this time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soma_common.dlq.store import Outcome
from soma_common.errors import LetterChanged
from tests.dlq_support import Desk, failure, known, undelivered


async def test_a_letter_learns_its_event_when_the_record_is_parked_again(desk: Desk) -> None:
    """The second parking enters the event into the inbox: the letter must know that this row is its own."""
    one = undelivered("a")
    assert await desk.letters.park(replace(one, event=None), failure(), attempts=1)
    assert not await desk.letters.park(one, failure(), attempts=1)
    assert one.event is not None
    found = known(await desk.dlq.show(await desk.id_of(one)))
    assert (found.event_id, found.tenant_id) == (one.event.event_id, one.event.tenant_id)
    assert (found.event_type, found.idempotency_key) == (one.event.event_type, one.event.idempotency_key)
    assert (await desk.claim(one)).fresh == (False,)


async def test_letters_learn_their_events_when_records_are_blocked_again(desk: Desk) -> None:
    first, second, third = (undelivered("a") for _ in range(3))
    for each in (first, third):
        assert await desk.letters.park(replace(each, event=None), failure(), attempts=1)
    assert await desk.block(first, second, third)
    assert await desk.rows() == [
        (first.record.offset, "dead"), (third.record.offset, "dead"), (second.record.offset, "blocked")
    ]  # fmt: skip
    for each in (first, second, third):
        assert each.event is not None
        assert known(await desk.dlq.show(await desk.id_of(each))).event_id == each.event.event_id


async def test_what_is_known_or_settled_stays_as_it_is(desk: Desk) -> None:
    one, other = undelivered("a"), undelivered("a")
    await desk.park(one)
    assert await desk.letters.park(replace(other, event=None), failure(), attempts=1)
    assert await desk.dlq.discard(await desk.id_of(other), "garbage")
    before = [await desk.dlq.show(await desk.id_of(each)) for each in (one, other)]
    assert await desk.block(replace(one, event=other.event), other)
    assert [await desk.dlq.show(await desk.id_of(each)) for each in (one, other)] == before


async def test_a_try_that_read_the_letter_before_does_not_settle_it(desk: Desk) -> None:
    one = undelivered("a")
    assert await desk.letters.park(replace(one, event=None), failure(), attempts=1, retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    assert await desk.block(one)
    with pytest.raises(LetterChanged):
        await desk.apply(lease, letter)
    (letter,) = await desk.letters.letters(lease)
    assert await desk.apply(lease, letter) == Outcome.CLOSED
