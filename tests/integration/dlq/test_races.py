"""The races of decision 0007, with transactions that are really open at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from soma_common.dlq.models import Status
from soma_common.dlq.store import Outcome
from soma_common.errors import LeaseLost, LetterChanged
from tests.core_support import waiting_for_lock
from tests.dlq_support import Desk, failure, undelivered


@contextlib.asynccontextmanager
async def transaction(desk: Desk) -> AsyncIterator[Any]:
    async with desk.pool.transaction() as tx:
        yield tx


async def until_waiting(desk: Desk, tx: Any) -> None:
    """Until the backend of ``tx`` waits for a lock."""
    async with desk.pool.connection() as watcher:
        await waiting_for_lock(watcher, tx.get_server_pid())


async def test_a_claim_that_waited_sees_what_the_former_owner_parked(desk: Desk) -> None:
    """The former owner parks event 1; the new owner's claim of 1 and 2 waits for it, and must find 2 blocked."""
    first, second = undelivered("a"), undelivered("a")
    async with transaction(desk) as former, transaction(desk) as new:
        await desk.claim(first, tx=former)
        claiming = asyncio.create_task(desk.claim(first, second, tx=new))
        await until_waiting(desk, new)
        sql = desk.letters._sql
        await former.fetch(sql["lock_sequence"], desk.consumer, first.sequence, None)
        await desk.letters._write(former, [first], Status.DEAD, failure(), (3, None, 0))
        await former.execute("COMMIT; BEGIN")
        claimed = await claiming
        assert claimed.fresh == (False, True)
        assert claimed.blocked == (False, True)
        assert await desk.letters.block(new, [second])
    assert await desk.rows() == [(first.record.offset, "dead"), (second.record.offset, "blocked")]


async def test_a_claim_behind_a_former_owner_that_rolled_back_is_fresh(desk: Desk) -> None:
    one = undelivered("a")
    async with transaction(desk) as new:
        with contextlib.suppress(ZeroDivisionError):
            async with transaction(desk) as former:
                await desk.claim(one, tx=former)
                claiming = asyncio.create_task(desk.claim(one, tx=new))
                await until_waiting(desk, new)
                raise ZeroDivisionError
        assert (await claiming).fresh == (True,)


async def test_parking_what_another_owner_is_applying_waits_and_buries_nothing(desk: Desk) -> None:
    one = undelivered("a")
    async with transaction(desk) as owner:
        await desk.claim(one, tx=owner)
        parking = asyncio.create_task(desk.park(one))
        await asyncio.sleep(0.1)
        assert not parking.done()
    assert await parking == [False]
    assert await desk.rows() == []


async def test_two_park_the_same_event_at_once(desk: Desk) -> None:
    one = undelivered("a")
    results = await asyncio.gather(*(desk.park(one) for _ in range(6)))
    assert sorted(map(tuple, results)) == [(False,)] * 5 + [(True,)]
    assert len(await desk.rows()) == 1


async def test_parking_different_events_of_one_sequence_at_once(desk: Desk) -> None:
    many = [undelivered("a") for _ in range(8)]
    assert await asyncio.gather(*(desk.park(each) for each in many)) == [[True]] * 8
    assert await desk.sequences() == 1


async def test_blocking_behind_the_last_resolve_finds_the_sequence_gone(desk: Desk) -> None:
    """The lane waits for the re-drive's lock; then everything before its event is applied, and it applies it itself."""
    one, later = undelivered("a"), undelivered("a")
    await desk.park(one, retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    async with transaction(desk) as lane:
        assert (await desk.claim(later, tx=lane)).blocked == (True,)
        async with transaction(desk) as redrive:
            assert await desk.letters.resolve(redrive, lease, letter) is Outcome.CLOSED
            blocking = asyncio.create_task(desk.letters.block(lane, [later]))
            await until_waiting(desk, lane)
        assert not await blocking
    assert await desk.sequences() == 0


async def test_blocking_before_the_last_resolve_keeps_the_sequence(desk: Desk) -> None:
    one, later = undelivered("a"), undelivered("a")
    await desk.park(one, retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    async with transaction(desk) as lane, transaction(desk) as redrive:
        await desk.claim(later, tx=lane)
        assert await desk.letters.block(lane, [later])
        resolving = asyncio.create_task(desk.letters.resolve(redrive, lease, letter))
        await until_waiting(desk, redrive)
        await lane.execute("COMMIT; BEGIN")
        assert await resolving is Outcome.READY  # the blocked one is next, under the same lease
        await redrive.execute("COMMIT; BEGIN")
        assert [each.record.offset for each in await desk.letters.letters(lease)] == [later.record.offset]
    assert await desk.redrive() == []  # still leased


async def test_parking_while_the_sequence_is_being_closed_opens_it_anew(desk: Desk) -> None:
    one, other = undelivered("a"), undelivered("a")
    await desk.park(one, retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    async with transaction(desk) as redrive:
        await desk.letters.resolve(redrive, lease, letter)
        parking = asyncio.create_task(desk.park(other, retry_in=0))
        await asyncio.sleep(0.1)
        assert not parking.done()
    assert await parking == [True]
    assert await desk.redrive() == [other.record.offset]
    assert await desk.sequences() == 0


async def test_two_workers_never_lease_one_sequence(desk: Desk) -> None:
    await desk.park(*(undelivered(f"k{n}") for n in range(20)), retry_in=0)
    found = await asyncio.gather(*(desk.letters.lease_due(f"w{n}", most=7) for n in range(4)))
    leased = [lease.sequence for leases in found for lease in leases]
    assert len(leased) == len(set(leased))
    leased += [lease.sequence for lease in await desk.letters.lease_due("last", most=20)]
    assert len(set(leased)) == len(leased) == 20


async def test_leasing_passes_over_a_locked_sequence(desk: Desk) -> None:
    await desk.park(undelivered("a"), undelivered("b"), retry_in=0)
    async with transaction(desk) as tx:
        await tx.fetch("SELECT FROM soma.dead_sequences WHERE sequence = $1 FOR UPDATE", b"ka")
        assert [lease.sequence for lease in await desk.letters.lease_due("w", most=9)] == [b"kb"]


async def test_a_lost_lease_settles_nothing(desk: Desk) -> None:
    one = undelivered("a")
    await desk.park(one, retry_in=0)
    old = await desk.lease("first", seconds=0.01)
    (letter,) = await desk.letters.letters(old) or [await desk.dlq.show(await desk.id_of(one))]
    await asyncio.sleep(0.05)
    new = await desk.lease("second")
    assert await desk.letters.letters(old) == []
    with pytest.raises(LeaseLost):
        await desk.apply(old, letter)
    with pytest.raises(LeaseLost):
        await desk.letters.fail(old, letter, failure(), retry_in=1)
    with pytest.raises(LeaseLost):
        await desk.letters.renew(old)
    await desk.letters.release(old)  # not ours: nothing happens
    assert (await desk.letters.renew(new)).until > new.until
    assert await desk.apply(new, letter) == Outcome.CLOSED
    with pytest.raises(LeaseLost):
        await desk.apply(new, letter)


async def test_effects_of_a_try_that_lost_its_lease_are_rolled_back(desk: Desk) -> None:
    await desk.pool.fetch("CREATE TABLE effect (n int)")
    await desk.park(undelivered("a"), retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    await desk.letters.release(lease)
    with pytest.raises(LeaseLost):
        async with transaction(desk) as tx:
            await tx.execute("INSERT INTO effect VALUES (1)")
            await desk.letters.resolve(tx, lease, letter)
    assert await desk.pool.fetch("SELECT FROM effect") == []


async def test_a_letter_discarded_or_edited_during_its_try_is_not_resolved(desk: Desk) -> None:
    one, other = undelivered("a"), undelivered("a")
    await desk.park(one, other, retry_in=0)
    lease = await desk.lease()
    first, second = await desk.letters.letters(lease)
    await desk.dlq.edit(first, {"n": 2})
    with pytest.raises(LetterChanged):
        await desk.apply(lease, first)
    await desk.dlq.discard(first.letter.letter_id, "no use")
    with pytest.raises(LetterChanged):
        await desk.letters.fail(lease, first, failure())
    assert await desk.apply(lease, second) == Outcome.CLOSED
    assert await desk.rows() == [(one.record.offset, "discarded"), (other.record.offset, "resolved")]


async def test_an_edit_under_a_resolve_is_refused(desk: Desk) -> None:
    await desk.park(undelivered("a"), retry_in=0)
    lease = await desk.lease()
    (letter,) = await desk.letters.letters(lease)
    async with transaction(desk) as tx:
        await desk.letters.resolve(tx, lease, letter)
        editing = asyncio.create_task(desk.dlq.edit(letter, {"n": 2}))
        await asyncio.sleep(0.1)
        assert not editing.done()
    with pytest.raises(LetterChanged, match="resolved"):
        await editing


async def test_a_double_click_does_nothing_twice(desk: Desk) -> None:
    one = undelivered("a")
    await desk.park(one)
    letter = await desk.id_of(one)
    assert sorted(await asyncio.gather(*(desk.dlq.retry_event(letter) for _ in range(6)))) == [False] * 5 + [True]
    assert [entry.what for entry in await desk.dlq.history(letter)] == ["dead", "redriving"]
    assert sorted(await asyncio.gather(*(desk.dlq.discard(letter, "x") for _ in range(4)))) == [False] * 3 + [True]
    assert [entry.what for entry in await desk.dlq.history(letter)] == ["dead", "redriving", "discarded"]


async def test_everything_at_once_keeps_each_letter_and_its_order(desk: Desk) -> None:
    """Lanes that block, workers that re-drive, people who retry: every event is applied once, in its key's order."""
    await desk.pool.fetch("CREATE TABLE effect (seq bigserial, key text, n bigint)")
    keys, per_key = [f"k{n}" for n in range(4)], 25
    effect = "INSERT INTO effect (key, n) VALUES ($1, $2)"
    done = asyncio.Event()

    async def lane(key: str) -> None:
        for n in range(per_key):
            one = undelivered(key)
            if n % 7 == 3 and await desk.letters.park(one, failure(), attempts=1, retry_in=0):
                continue
            while True:
                async with transaction(desk) as tx:
                    claimed = await desk.claim(one, tx=tx)
                    if not claimed.fresh[0]:
                        break
                    if not claimed.blocked[0]:
                        await tx.execute(effect, key, one.record.offset)
                        break
                    if await desk.letters.block(tx, [one]):
                        break
                    await tx.execute("ROLLBACK; BEGIN")

    async def worker(name: str) -> None:
        while not done.is_set() or await desk.sequences():
            for lease in await desk.letters.lease_due(name, most=2):
                for letter in await desk.letters.letters(lease):
                    with contextlib.suppress(LeaseLost, LetterChanged):
                        async with transaction(desk) as tx:
                            key = (letter.record.key or b"").decode()
                            await tx.execute(effect, key, letter.record.offset)
                            await desk.letters.resolve(tx, lease, letter)
                await desk.letters.release(lease)
            await asyncio.sleep(0.005)

    workers = [asyncio.create_task(worker(f"w{n}")) for n in range(2)]
    await asyncio.gather(*(lane(key) for key in keys))
    done.set()
    await asyncio.wait_for(asyncio.gather(*workers), 60)
    rows = await desk.pool.fetch("SELECT key, n FROM effect ORDER BY seq")
    assert len(rows) == len(keys) * per_key
    for key in keys:
        numbers = [row[1] for row in rows if row[0] == key]
        assert numbers == sorted(set(numbers))
