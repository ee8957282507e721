"""Parking and blocking: verbatim, once, in order."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from soma_common.dlq.failures import Stage
from soma_common.dlq.models import Status
from soma_common.dlq.store import Undelivered
from soma_common.events.store import ALL_TENANTS
from tests.dlq_support import Desk, failure, fresh_event, offsets, undelivered


async def test_a_parked_letter_is_kept_to_the_byte(desk: Desk) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    headers = (("h", b"1"), ("h", b"2"), ("null", None), ("empty", b""), ("nul\0name", b"\0\xff"), ("\udcff", b"x"))
    one = undelivered(b"\0\xffkey", value=b'{"n":\x00\xfe}', headers=headers, timestamp=moment)
    assert await desk.park(one) == [True]
    letter = await desk.dlq.show(await desk.id_of(one))
    assert letter.record == one.record
    assert letter.value == one.record.value
    assert letter.letter.status is Status.DEAD
    assert letter.letter.stage is Stage.HANDLE
    assert letter.letter.attempts == 3
    assert one.event is not None
    assert letter.letter.event.event_id == one.event.event_id
    assert "ValueError: it failed" in (letter.stack or "")
    (entry,) = await desk.dlq.history(letter.letter.letter_id)
    assert (entry.who, entry.what, entry.why) == ("consumer billing", "dead", "it failed")


async def test_nulls_stay_nulls(desk: Desk) -> None:
    one = undelivered(None, value=None, event=fresh_event())
    await desk.park(one)
    letter = await desk.dlq.show(await desk.id_of(one))
    assert (letter.record.key, letter.record.value, letter.record.headers) == (None, None, ())
    assert letter.letter.sequence == b"porders[0]"


async def test_parking_twice_changes_nothing(desk: Desk) -> None:
    one = undelivered()
    assert await desk.park(one, one) == [True, False]
    assert len(await desk.rows()) == 1


async def test_what_was_applied_is_not_parked(desk: Desk) -> None:
    one = undelivered()
    assert (await desk.claim(one)).fresh == (True,)
    assert await desk.park(one) == [False]
    assert await desk.rows() == []
    assert await desk.sequences() == 0


async def test_an_undecodable_record_is_parked_once(desk: Desk) -> None:
    whole = undelivered()
    one = Undelivered(record=whole.record, sequence=whole.sequence)
    broken = failure("bad bytes", Stage.DECODE)
    assert await desk.letters.park(one, broken, attempts=1)
    assert not await desk.letters.park(one, broken, attempts=1)
    assert await desk.dlq.discard(await desk.id_of(one), "garbage")
    assert await desk.sequences() == 0
    assert not await desk.letters.park(one, broken, attempts=1)
    assert await desk.sequences() == 0  # a sequence without open letters would block its key for ever
    assert (await desk.dlq.list_dlq_events(tenant_id="t")).letters == ()
    assert len((await desk.dlq.list_dlq_events(tenant_id=ALL_TENANTS)).letters) == 1


async def test_the_same_offset_of_a_recreated_topic_is_another_letter(desk: Desk) -> None:
    one = undelivered(value=b"old")
    other = undelivered(value=b"new", offset=one.record.offset)
    assert await desk.park(one, other) == [True, True]


async def test_the_digest_tells_null_from_empty_and_key_from_value() -> None:
    pairs = [(None, b""), (b"", None), (b"", b""), (None, None), (b"a", b"bc"), (b"ab", b"c"), (b"-", None)]
    assert len({undelivered(k, value=v).record.digest for k, v in pairs}) == len(pairs)


async def test_later_events_of_a_sequence_are_blocked_in_order(desk: Desk) -> None:
    first, later, other = undelivered("a"), [undelivered("a") for _ in range(30)], undelivered("b")
    await desk.park(first)
    async with desk.pool.transaction() as tx:
        claimed = await desk.claim(other, *later, tx=tx)
        assert claimed.fresh == (True,) * 31
        assert claimed.blocked == (False, *(True,) * 30)
        assert await desk.letters.block(tx, later)
    assert await desk.rows() == [(first.record.offset, "dead"), *((n, "blocked") for n in offsets(later))]
    assert (await desk.claim(*later)).fresh == (False,) * 30


async def test_headers_of_blocked_letters_do_not_mix(desk: Desk) -> None:
    first = undelivered("a")
    many = [undelivered("a", headers=tuple((f"h{n}", None) for n in range(size))) for size in (2, 0, 3)]
    await desk.park(first)
    assert await desk.block(*many)
    for each in many:
        assert (await desk.dlq.show(await desk.id_of(each))).record.headers == each.record.headers


async def test_nothing_is_blocked_behind_a_settled_sequence(desk: Desk) -> None:
    assert not await desk.block(undelivered("a"))
    assert await desk.block()
    assert await desk.rows() == []


async def test_other_consumers_are_not_concerned(desk: Desk) -> None:
    other = await Desk.open(desk.pool, "shipping")
    one = undelivered("a")
    await desk.park(one)
    assert (await other.claim(one, undelivered("a"))).blocked == (False, False)
    assert not await other.block(undelivered("a"))


async def test_claims_by_id_and_by_given_key_together(desk: Desk) -> None:
    await desk.park(undelivered("x"))
    by_id = [undelivered(key) for key in ("a", "x", "b")]
    by_key = [undelivered(key, event=fresh_event(idempotency_key=f"mine-{n}")) for n, key in enumerate("xab")]
    assert (await desk.claim(by_key[1], by_id[0])).fresh == (True, True)
    claimed = await desk.claim(by_key[0], by_id[0], by_key[1], by_id[1], by_key[2], by_id[1], by_id[2])
    assert claimed.fresh == (True, False, False, True, True, False, True)
    assert claimed.blocked == (True, False, False, True, False, False, False)
    again = await desk.claim(*by_id, *by_key)
    assert again.fresh == again.blocked == (False,) * 6
    assert (await desk.claim()).fresh == ()


async def test_one_id_or_key_of_several_tenants_and_services(desk: Desk) -> None:
    """A claim sends tenants and services that are all alike only once: what differs must not become alike."""
    for name in ({}, {"idempotency_key": "mine"}):
        one = fresh_event(**name)
        mine, theirs = undelivered("a", event=one), undelivered("b", event=replace(one, tenant_id="other"))
        elsewhere = undelivered("c", event=replace(one, service_id="other"))
        assert (await desk.claim(mine, mine)).fresh == (True, False)
        assert (await desk.claim(theirs, elsewhere, mine)).fresh == (True, True, False)
        assert (await desk.claim(elsewhere, theirs)).fresh == (False, False)
        both = replace(one, tenant_id="other", service_id="other")
        assert (await desk.claim(undelivered("d", event=both), undelivered("d", event=both))).fresh == (True, False)
