"""Dead letters and rebuilds: what has no effect in the live tables gets none in the new ones, and the other way round."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soma_common.errors import ReplayRefused
from soma_common.replay.models import ReplayState
from soma_common.sql.loader import blocks
from tests.integration.replay.projecting import BOTH, SENT, book, make_tables, schemas
from tests.waiting import until

KEYS = 6


async def numbers(replays: Any) -> dict[int, list[int]]:
    """By key, the applied numbers in the order of their application; the sums agree with them."""
    rows = await replays.pool.fetch("SELECT key, array_agg(number ORDER BY seq) FROM effect GROUP BY key")
    totals = await replays.pool.fetch("SELECT key, total, events FROM balance")
    assert {row[0]: (sum(row[1]), len(row[1])) for row in rows} == {row[0]: (row[1], row[2]) for row in totals}
    return {int(row[0].rpartition("a")[2].rstrip("')")): list(row[1]) for row in rows}


class Flaky:
    """``book``, but some numbers fail until they are mended."""

    def __init__(self, *broken: int) -> None:
        self.broken = set(broken)

    async def __call__(self, event: Any, ctx: Any) -> None:
        if event.payload["n"] in self.broken:
            raise ValueError(f"{event.payload['n']} is broken")
        await book(event, ctx)


async def letter(replays: Any, number: int) -> Any:
    """The letter of an event by its number."""
    (found,) = [each for each in await replays.letters() if json.loads(each.record.value)["payload"]["n"] == number]
    return found


async def closed(replays: Any, key: int) -> None:
    """Until nothing of a key is open."""
    sql = "SELECT count(*) FROM soma.dead_sequences d WHERE convert_from(d.sequence, 'utf8') LIKE $1"

    async def none() -> bool:
        return bool((await replays.pool.fetch(sql, f"%a{key}"))[0][0] == 0)

    await until(none, what=f"the letters of a{key} settled")


async def settled(replays: Any, worker: Any, count: int) -> None:
    """Until the worker has settled so many events, and its positions say so."""
    await until(lambda: worker.stats().tally.settled >= count, what=f"{count} settled events")
    await replays.pool.fetch("SELECT soma.tick('0')")
    tick = (await replays.store.ticks.latest()).tick_id

    async def there() -> bool:
        return bool((await replays.pool.fetch(blocks("readers")["passed"], "consumer:billing", tick))[0][0])

    await until(there, what="the stored positions")


def without(key: int, count: int, *, below: int = 10**9, but: tuple[int, ...] = ()) -> list[int]:
    return [n for n in range(key, count, KEYS) if n < below and n not in but]


async def test_letters_before_during_and_after_a_rebuild(replays: Any) -> None:
    flaky = Flaky(13, 20, 27, 30)  # of the keys 1, 2, 3 and 0
    await make_tables(replays)
    await replays.publish(60, keys=KEYS)
    async with replays.log_worker(flaky) as worker:
        await settled(replays, worker, 60)
        before = await numbers(replays)
        assert before[1] == [1, 7]
        async with replays.engine(book) as engine:  # would not fail: and leaves them to the re-drive all the same
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            caught_up = await replays.finish(engine, run, swap=False)
            assert caught_up.state is ReplayState.RUNNING
            assert caught_up.counts.held == len(await replays.letters()) == 8 + 7 + 6 + 5
            assert await numbers(replays) == before

            flaky.broken = {30}
            await replays.dlq.retry_event((await letter(replays, 13)).letter.letter_id)
            await replays.dlq.discard((await letter(replays, 20)).letter.letter_id, "nobody wants it")
            wrong = await letter(replays, 27)
            value = json.loads(wrong.record.value)
            value["payload"]["n"] = 1000
            await replays.dlq.retry_event(wrong.letter.letter_id, transform=lambda _: value)
            for key in (1, 2, 3):
                await closed(replays, key)
            await replays.publish(60, keys=KEYS, start=60)
            await settled(replays, worker, 120)
            live = await numbers(replays)
            assert (await replays.finish(engine, run)).state is ReplayState.DONE
        assert await numbers(replays) == live
        assert live[0] == without(0, 120, below=30)
        assert live[1] == without(1, 120)
        assert live[2] == without(2, 120, but=(20,))
        assert live[3] == [1000 if n == 27 else n for n in without(3, 120)]
        flaky.broken = set()  # and what was open at the swap is re-driven into the new tables
        await replays.dlq.retry_event((await letter(replays, 30)).letter.letter_id)
        await closed(replays, 0)
        assert (await numbers(replays))[0] == without(0, 120)
        assert len(set(SENT)) == 119, "a mail for each, but for the discarded one"
    assert await schemas(replays) == []


async def test_a_letter_that_was_deleted_meanwhile_ends_the_rebuild(replays: Any) -> None:
    flaky = Flaky(7)
    await make_tables(replays)
    await replays.publish(20, keys=KEYS)
    async with replays.log_worker(flaky) as worker:
        await settled(replays, worker, 20)
    async with replays.engine(book) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        assert (await replays.finish(engine, run, swap=False)).counts.held == 3
        await replays.pool.fetch("DELETE FROM soma.dead_letters")
        with pytest.raises(ReplayRefused, match="letter was deleted"):
            await replays.finish(engine, run)
        await engine.cancel(run.run_id)
    assert await replays.pool.fetch("SELECT FROM soma.replay_held") == []


async def test_a_letter_resolved_between_two_tries_of_the_swap(replays: Any) -> None:
    """More letters than one look takes, all re-driven while the rebuild waits."""
    flaky = Flaky(0)
    await make_tables(replays)
    await replays.publish(700, keys=1)
    async with replays.log_worker(flaky) as worker:
        await settled(replays, worker, 700)
        async with replays.engine(book) as engine:
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            assert (await replays.finish(engine, run, swap=False)).counts.held == 700
            flaky.broken = set()
            await replays.dlq.retry_event((await letter(replays, 0)).letter.letter_id)
            await closed(replays, 0)
            assert (await replays.finish(engine, run)).state is ReplayState.DONE
    assert (await numbers(replays))[0] == list(range(700))
