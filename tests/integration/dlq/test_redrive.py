"""Leases, tries and what becomes of a sequence; then the verbs of people."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from soma_common.dlq.filters import LetterFilter
from soma_common.dlq.models import FullLetter, RedrivePolicy, Status
from soma_common.dlq.store import Outcome
from soma_common.errors import EventTooLarge, LetterChanged, LetterNotFound, TenantRequired, ValidationError
from soma_common.events.store import ALL_TENANTS
from tests.dlq_support import Desk, failure, fresh_event, offsets, undelivered


async def test_a_sequence_is_redriven_whole_and_in_order(desk: Desk) -> None:
    many = [undelivered("a") for _ in range(5)]
    await desk.park(many[0], retry_in=0)
    assert await desk.block(*many[1:])
    assert await desk.redrive() == offsets(many)
    assert {status for _, status in await desk.rows()} == {"resolved"}
    assert await desk.sequences() == 0
    assert (await desk.claim(undelivered("a"))).blocked == (False,)


async def test_what_is_not_due_is_not_leased(desk: Desk) -> None:
    await desk.park(undelivered("dead"))
    await desk.park(undelivered("later"), retry_in=3600)
    assert await desk.letters.lease_due("w", most=9) == []
    await desk.pool.fetch("UPDATE soma.dead_sequences SET next_at = now() WHERE next_at IS NOT NULL")
    (lease,) = await desk.letters.lease_due("w", most=9)
    assert lease.sequence == b"klater"


async def test_large_letters_are_not_all_read_at_once(desk: Desk) -> None:
    """A hundred of the largest records would be more than a worker has memory for, and its death counts as theirs."""
    many = [undelivered("a", value=bytes(6 * 1024 * 1024)) for _ in range(5)]
    huge = undelivered("b", value=bytes(20 * 1024 * 1024))
    await desk.park(many[0], huge, retry_in=0)
    assert await desk.block(*many[1:])
    first, second = await desk.letters.lease_due("w", most=2)
    assert len(await desk.letters.letters(first)) == 3
    assert len(await desk.letters.letters(second)) == 1
    await desk.letters.release(first)
    await desk.letters.release(second)
    assert await desk.redrive() == [*offsets(many), huge.record.offset]


async def test_a_failed_try_waits_again_and_ends_the_lease(desk: Desk) -> None:
    one = undelivered("a")
    await desk.park(one, retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    assert await desk.letters.fail(lease, letter, failure("again"), retry_in=60, automatic_left=2) is Outcome.WAITING
    now = await desk.dlq.show(letter.letter.letter_id)
    assert (now.letter.status, now.letter.attempts, now.letter.automatic_left) == (Status.RETRYING, 4, 2)
    assert now.message == "again"
    assert now.letter.next_at is not None
    assert timedelta(seconds=50) < now.letter.next_at - datetime.now(UTC) < timedelta(seconds=61)
    assert await desk.letters.lease_due("w") == []


async def test_a_try_that_fails_for_good_waits_for_people(desk: Desk) -> None:
    one, later = undelivered("a"), undelivered("a")
    await desk.park(one, retry_in=0)
    await desk.block(later)
    lease = await desk.lease()
    first, _ = await desk.letters.letters(lease)
    assert await desk.letters.fail(lease, first, failure()) is Outcome.WAITING
    assert await desk.rows() == [(one.record.offset, "dead"), (later.record.offset, "blocked")]
    assert await desk.redrive() == []
    assert await desk.dlq.retry_event(await desk.id_of(later))  # one letter stands for its sequence
    assert await desk.redrive() == offsets([one, later])


async def test_a_dead_letter_in_the_middle_stops_the_redrive(desk: Desk) -> None:
    first, dead, last = (undelivered("a") for _ in range(3))
    await desk.park(first, retry_in=0)
    await desk.park(dead)
    await desk.block(last)
    assert await desk.redrive() == [first.record.offset]
    assert await desk.letters.lease_due("w") == []
    await desk.dlq.discard(await desk.id_of(dead), "garbage")
    assert await desk.redrive() == [last.record.offset]


async def test_the_end_of_a_lease_lets_another_worker_in(desk: Desk) -> None:
    await desk.park(undelivered("a"), retry_in=0)
    await desk.lease("first", seconds=0.2)
    assert await desk.letters.lease_due("second") == []
    await asyncio.sleep(0.25)
    assert (await desk.lease("second")).owner == "second"


async def test_pages_have_every_letter_once(desk: Desk) -> None:
    many = [undelivered(f"k{n % 3}") for n in range(25)]
    await desk.park(*many)
    for newest in (False, True):
        seen, cursor = [], None
        while True:
            page = await desk.dlq.list_dlq_events(cursor=cursor, limit=10, newest_first=newest, tenant_id="t")
            seen += [letter.offset for letter in page.letters]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == (offsets(many)[::-1] if newest else offsets(many))


async def test_each_filter_finds_its_letters_and_no_others(desk: Desk) -> None:
    other = await Desk.open(desk.pool, "shipping")
    event = fresh_event(tenant_id="u", event_type="order.paid")
    one, two = undelivered("a", event=event), undelivered("b")
    await desk.park(one)
    await other.park(two, retry_in=60)
    letter = (await desk.dlq.show(await desk.id_of(one))).letter
    moment = letter.parked_at
    conditions: list[dict[str, Any]] = [
        {"tenant_id": "u"}, {"consumer": "billing"}, {"statuses": "dead"}, {"statuses": [Status.DEAD]},
        {"event_type": "order.paid"}, {"event_id": event.event_id}, {"event_id": str(event.event_id)},
        {"until": moment + timedelta(microseconds=1)},
    ]  # fmt: skip
    for given in conditions:
        page = await desk.dlq.list_dlq_events(**({"tenant_id": ALL_TENANTS} | given))
        assert [found.offset for found in page.letters] == [one.record.offset], given
    for given in ({"stage": "handle"}, {"fingerprint": letter.fingerprint}, {"error_type": "ValueError"},
                  {"trace_id": event.trace_id}, {"since": moment}, {"statuses": ["dead", "retrying"]}):  # fmt: skip
        assert len((await desk.dlq.list_dlq_events(tenant_id=ALL_TENANTS, **given)).letters) == 2, given
    assert (await desk.dlq.list_dlq_events(tenant_id="u", consumer="shipping")).letters == ()


@pytest.mark.parametrize(
    "given",
    [
        {"cursor": "x"}, {"cursor": "-1"}, {"cursor": "9" * 30}, {"cursor": "٣"}, {"cursor": 5}, {"limit": 0},
        {"limit": 1001}, {"limit": "5"}, {"statuses": "odd"}, {"statuses": 7}, {"event_id": "x"}, {"event_id": 3},
        {"event_type": "a\0b"}, {"consumer": "\ud800"}, {"consumer": 3}, {"since": datetime(2026, 1, 1)},
        {"nonsense": 1}, {"consumer": b"billing"},
    ],
)  # fmt: skip
async def test_wrong_questions_are_refused(desk: Desk, given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        await desk.dlq.list_dlq_events(**({"tenant_id": "t"} | given))


async def test_the_tenant_is_always_named(desk: Desk) -> None:
    with pytest.raises(TenantRequired):
        await desk.dlq.list_dlq_events()
    with pytest.raises(TenantRequired):
        await desk.dlq.summary(tenant_id="")
    with pytest.raises(TenantRequired):
        await desk.dlq.retry_many(statuses="dead")


async def test_unknown_ids_are_errors(desk: Desk) -> None:
    unknown = uuid4()
    for call in (desk.dlq.show(unknown), desk.dlq.retry_event(unknown), desk.dlq.discard(str(unknown), "x")):
        with pytest.raises(LetterNotFound):
            await call
    for call in (desk.dlq.show("1"), desk.dlq.retry_event("x\0"), desk.dlq.history(7)):  # type: ignore[arg-type]
        with pytest.raises(ValidationError):
            await call
    assert await desk.dlq.history(unknown) == []


async def test_an_edit_keeps_the_original_and_its_author(desk: Desk) -> None:
    one = undelivered("a", value=b'{"n": 1}')
    await desk.park(one)
    letter = await desk.dlq.show(await desk.id_of(one))
    assert await desk.dlq.edit(letter, {"n": 2}, why="typo") == 1
    with pytest.raises(LetterChanged, match="revision 1, not at 0"):
        await desk.dlq.edit(letter, {"n": 3})
    again = await desk.dlq.show(letter.letter.letter_id)
    assert (again.record.value, again.edited_value, again.value) == (b'{"n": 1}', b'{"n":2}', b'{"n":2}')
    assert again.letter.edited_by == "ann"
    assert await desk.dlq.edit(again, b"[1]") == 2
    told = await desk.dlq.history(letter.letter.letter_id)
    assert [(e.who, e.what, e.why, e.value) for e in told[1:]] == [
        ("ann", "edited", "typo", b'{"n":2}'), ("ann", "edited", None, b"[1]")
    ]  # fmt: skip


@pytest.mark.parametrize("value", [b"no json", b"", object(), {"n": float("nan")}, {"n": "\0"}])
async def test_values_that_are_no_json_are_refused(desk: Desk, value: Any) -> None:
    one = undelivered("a")
    await desk.park(one)
    letter = await desk.dlq.show(await desk.id_of(one))
    with pytest.raises(ValidationError):
        await desk.dlq.edit(letter, value)
    assert await desk.dlq.edit(letter, b"\0\xff", raw=True) == 1


async def test_a_value_has_its_limit(desk: Desk) -> None:
    one = undelivered("a", value=b"\0")
    await desk.park(one)
    with pytest.raises(EventTooLarge):
        await desk.dlq.edit(await desk.dlq.show(await desk.id_of(one)), bytes(16 * 1024 * 1024 + 1))


async def test_a_retry_with_a_transform(desk: Desk) -> None:
    one = undelivered("a", value=b'{"n": 1}')
    await desk.park(one)
    letter = await desk.id_of(one)

    async def mend(given: FullLetter) -> dict[str, int]:
        return {"n": len(given.value or b"")}

    assert await desk.dlq.retry_event(letter, transform=mend)
    lease = await desk.lease()
    (taken,) = await desk.letters.letters(lease)
    assert taken.value == b'{"n":8}'
    assert await desk.apply(lease, taken) == Outcome.CLOSED
    assert not await desk.dlq.retry_event(letter)
    with pytest.raises(LetterChanged):
        await desk.dlq.retry_event(letter, transform=lambda _: b"{}")
    with pytest.raises(LetterChanged, match="resolved"):
        await desk.dlq.discard(letter, "too late")


async def test_a_transform_that_returns_nothing_is_refused(desk: Desk) -> None:
    """Else `null` would be the new value, and the letter would be tried with it."""
    one = undelivered("a")
    await desk.park(one)
    letter = await desk.id_of(one)
    with pytest.raises(ValidationError, match="returned None"):
        await desk.dlq.retry_event(letter, transform=lambda _: None)
    assert (await desk.dlq.show(letter)).letter.status is Status.DEAD
    assert (await desk.dlq.show(letter)).edited_value is None


async def test_a_retry_of_a_settled_letter_leaves_its_sequence_alone(desk: Desk) -> None:
    first, second = undelivered("a"), undelivered("a")
    await desk.park(first, second)
    assert await desk.dlq.discard(await desk.id_of(first), "garbage")
    assert not await desk.dlq.retry_event(await desk.id_of(first), dry_run=True)
    assert not await desk.dlq.retry_event(await desk.id_of(first))
    assert await desk.rows() == [(first.record.offset, "discarded"), (second.record.offset, "dead")]


async def test_discarding_wants_a_reason(desk: Desk) -> None:
    one = undelivered("a")
    await desk.park(one)
    for reason in ("", "  ", None):
        with pytest.raises(ValidationError):
            await desk.dlq.discard(await desk.id_of(one), reason)  # type: ignore[arg-type]
    assert await desk.dlq.discard(await desk.id_of(one), "b\0ad \ud800")
    assert (await desk.dlq.history(await desk.id_of(one)))[-1].why == "b\N{REPLACEMENT CHARACTER}ad ?"


async def test_retry_many_marks_in_small_steps_what_matches(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soma_common.dlq.verbs.BATCH", 4)
    many = [undelivered(f"k{n}") for n in range(10)]
    await desk.park(*many)
    other = undelivered("other", event=fresh_event(tenant_id="u"))
    await desk.park(other)
    assert await desk.dlq.retry_many(tenant_id="t", dry_run=True) == 10
    assert await desk.dlq.retry_many(tenant_id="t", dry_run=True, most=3) == 3
    assert await desk.dlq.retry_many(tenant_id="t", statuses="blocked") == 0
    assert await desk.dlq.retry_many(LetterFilter(tenant_id="t"), most=3) == 3
    steps = [count async for count in desk.dlq.retry_stream(tenant_id="t", why="mended")]
    assert steps == [4, 3]
    assert await desk.dlq.retry_many(tenant_id="t") == 0
    assert await desk.redrive() == offsets(many)
    assert await desk.rows() == [*((n, "resolved") for n in offsets(many)), (other.record.offset, "dead")]


async def test_two_who_retry_everything_do_not_deadlock(desk: Desk) -> None:
    await desk.park(*(undelivered(f"k{n}") for n in range(60)))
    counts = await asyncio.gather(*(desk.dlq.retry_many(tenant_id="t") for _ in range(4)))
    assert sum(counts) == 60


async def test_the_summary_counts_by_kind(desk: Desk) -> None:
    many = [undelivered("a") for _ in range(3)]
    await desk.park(*many[:1])
    await desk.block(*many[1:])
    await desk.park(undelivered("b"))
    dead, blocked = sorted(await desk.dlq.summary(tenant_id="t"), key=lambda group: group.status, reverse=True)
    assert (dead.consumer, dead.status, dead.count, dead.error_type) == ("billing", "dead", 2, "ValueError")
    assert (blocked.status, blocked.count, blocked.fingerprint) == ("blocked", 2, None)
    assert dead.oldest < dead.newest
    assert (await desk.dlq.show(dead.example)).letter.fingerprint == dead.fingerprint
    assert await desk.dlq.summary(tenant_id="nobody") == []


async def test_captured_events_follow_the_policy(desk: Desk) -> None:
    from soma_common.dlq.failures import Stage
    from soma_common.dlq.handler import DLQHandler

    handler = DLQHandler(desk.pool, who="svc", policy=RedrivePolicy(after=60, tries=3))
    one, two = undelivered("a"), undelivered("b")
    assert await handler.capture_failed_event("new", one.record, ValueError("x"), event=one.event, attempts=5)
    assert not await handler.capture_failed_event("new", one.record, ValueError("x"), event=one.event)
    assert await handler.capture_failed_event("new", two.record, ValueError("x"), stage=Stage.DECODE)
    letters = (await handler.list_dlq_events(tenant_id=ALL_TENANTS, consumer="new")).letters
    assert [(each.status, each.automatic_left, each.attempts) for each in letters] == [
        ("retrying", 2, 5), ("dead", 0, 1)
    ]  # fmt: skip
    assert failure().stage == "handle"


async def test_huge_and_hostile_errors_are_kept_in_their_limits(desk: Desk) -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    for n, error in enumerate((ValueError("x\0\ud800" * 10**6), Hostile(), RecursionError("é" * 10**5))):
        assert await desk.dlq.capture_failed_event("billing", undelivered(f"k{n}").record, error)
    rows = await desk.pool.fetch("SELECT max(octet_length(error_message)), max(octet_length(error_stack)) "
                                 "FROM soma.dead_letters")  # fmt: skip
    assert rows[0][0] <= 4096
    assert rows[0][1] <= 8192


async def test_a_key_longer_than_an_index_entry(desk: Desk) -> None:
    one, other = undelivered(b"x" * 10**6), undelivered(b"x" * 10**6 + b"y")
    await desk.park(one)
    assert (await desk.claim(undelivered(b"x" * 10**6), other)).blocked == (True, False)
    assert (await desk.dlq.show(await desk.id_of(one))).record.key == b"x" * 10**6
