"""Events that end the process which handles them: by a signal, a crash in native code, an exit that nobody catches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.waiting import until

COUNT, KEYS, KILLER = 60, 6, 20  # the killer is the fourth event of its key
QUICK = {"batch": 10, "lanes": 3, "lease": 0.5, "save_every": 0.02}
# Before single file, in single file; and a death before which the position moved counts anew: by an event at least.
MOST_DEATHS = 3 + 3 + KILLER


class Keeper:
    """Starts the consumer again whenever it dies, and counts its deaths."""

    def __init__(self, world: Any, **given: Any) -> None:
        self._world, self._given, self.deaths = world, QUICK | given, 0
        self.codes: set[int] = set()
        self.process = world.process(**self._given)

    def look(self) -> None:
        """Start a new one if the last one died."""
        if self.process.poll() is not None:
            self.deaths += 1
            self.codes.add(self.process.returncode)
            self.process = self._world.process(**self._given)

    async def until(self, done: Callable[[], Any], what: str) -> None:
        """Keep the consumer alive until a condition holds."""

        async def kept() -> bool:
            await asyncio.to_thread(self.look)
            return bool(await done())

        await until(kept, within=120, what=what)


def _statuses(letters: list[Any]) -> list[tuple[str, Any]]:
    return [(str(letter.letter.status), letter.letter.event.event_id) for letter in letters]


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("segv", -11), ("kill", -9)])
async def test_the_killer_alone_is_buried(world: Any, how: str, code: int) -> None:
    events = await world.publish(COUNT, keys=KEYS)
    keeper = Keeper(world, poison={"numbers": [KILLER], "how": how})
    behind = [event for event in events if event.stream == events[KILLER].stream and event.payload["n"] >= KILLER]
    others = [event for event in events if event not in behind]

    async def all_settled() -> bool:
        return await world.count() == len(others) and len(await world.letters()) == len(behind)

    await keeper.until(all_settled, "all others are applied, and the killer is buried")
    letters = await world.letters()
    assert _statuses(letters) == [
        ("dead" if event is events[KILLER] else "blocked", event.event_id) for event in behind
    ]
    assert letters[0].letter.error_type == "soma_common.errors.PoisonEvent"
    assert 3 <= keeper.deaths <= MOST_DEATHS
    assert keeper.codes == {code}
    await world.check(others)

    await world.dlq.retry_event(letters[0].letter.letter_id, transform=_harmless, why="it met a bug in native code")
    await keeper.until(lambda: _resolved(world, len(behind)), "all letters are applied")
    await world.check(events)
    assert keeper.deaths <= MOST_DEATHS


async def test_two_killers_among_the_events_of_several_partitions(world: Any, topic: Any) -> None:
    """Both are found, though each kills the process in which the other is looked for."""
    events = await world.publish(COUNT, keys=KEYS)
    await topic.produce(events)
    given = {"source": "kafka", "bootstrap": topic.bootstrap, "topic": topic.name}
    keeper = Keeper(world, poison={"numbers": [KILLER, KILLER + 1], "how": "exit"}, instance="keeper", **given)
    killers = {events[KILLER].stream: KILLER, events[KILLER + 1].stream: KILLER + 1}
    others = [event for event in events if event.payload["n"] < killers.get(event.stream, COUNT)]

    async def all_settled() -> bool:
        return await world.count() == len(others) and len(await world.letters()) == COUNT - len(others)

    await keeper.until(all_settled, "all others are applied, and the killers are buried")
    dead = [letter.letter for letter in await world.letters() if letter.letter.status == "dead"]
    assert {letter.event.event_id for letter in dead} == {events[KILLER].event_id, events[KILLER + 1].event_id}
    await world.check(others)


async def test_a_letter_that_kills_whoever_re_drives_it_is_buried_again(world: Any, settings: Any) -> None:
    async def fails(event: Any, ctx: Any) -> None:
        raise ValueError("not yet")

    await world.publish(1)
    async with world.log_worker(fails, settings=settings()) as worker:
        await until(lambda: worker.stats().tally.dead == 1, what="the letter")
    (letter,) = await world.letters()
    await world.dlq.retry_event(letter.letter.letter_id)
    keeper = Keeper(world, poison={"numbers": [0], "how": "kill"}, idle=2.0, settings={"redrive_every": 0.05})

    async def buried() -> bool:
        (now,) = await world.letters()
        return bool(now.letter.status == "dead")

    await keeper.until(buried, "the letter is buried again")
    assert (await world.letters())[0].letter.error_type == "soma_common.errors.PoisonEvent"
    assert 2 <= keeper.deaths <= 8  # five, fewer where a busy machine let a lease lapse: that counts too
    more = await world.publish(20, start=1)
    await keeper.until(lambda: _blocked_or_applied(world, more), "the others go on")


async def test_who_is_killed_soon_after_each_start_buries_nobody(world: Any) -> None:
    """From outside, again and again, and always while it is at the same event: nobody has gone further yet."""
    events = await world.publish(20, keys=4)
    given = QUICK | {"slow": 0.2, "settings": {"poison_wait": 3.0}}
    for _ in range(9):
        process = world.process(**given)
        with suppress(AssertionError):  # not any more, after some deaths
            await until(lambda: _handling(world), within=1.0, what="an event is being handled")
        process.kill()
        process.wait()
    assert max(await _attempts(world)) == 1
    world.process(**given)
    await world.applied(20)
    await world.check(events)
    assert await world.letters() == []


async def test_a_database_that_goes_away_is_no_death_of_the_event_under_way(
    world: Any, settings: Any, apply: Any
) -> None:
    cut: list[bool] = []

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 0 and not cut:
            cut.append(True)
            await world.pool.fetch("SELECT pg_terminate_backend($1)", ctx.tx.get_server_pid())

    quick = settings(poison_wait=0.01)
    events = await _two_died_of_the_first(world, quick)
    async with world.log_worker(handle, settings=quick):
        await world.applied(3)
    assert cut == [True]
    await world.check(events)
    assert await world.letters() == []
    assert await _attempts(world) == []


async def test_who_leaves_alive_in_the_midst_of_an_event_did_not_die_of_it(world: Any, settings: Any) -> None:
    begun = asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    hasty = settings(poison_wait=0.01, drain=0.1)
    await _two_died_of_the_first(world, hasty)
    async with world.log_worker(handle, settings=hasty):
        await begun.wait()
        assert await _attempts(world) == [3]
    assert await _attempts(world) == [2]


async def test_only_events_with_which_somebody_died_are_begun_alone(world: Any, settings: Any) -> None:
    """The others of a suspect partition go together, in their order."""
    seen: list[list[int]] = []

    async def handle(events: Any, ctx: Any) -> None:
        seen.append([event.payload["n"] for event in events])

    await _begun_and_never_ended(world, settings(), count=10, begun={3: 0, 4: 0})
    async with world.log_worker(handle, batch=True, settings=settings()):
        await until(lambda: sum(map(len, seen)) == 10, what="all ten")
    assert seen == [[0, 1, 2], [3], [4], [5, 6, 7, 8, 9]]
    assert await _attempts(world) == []


async def _two_died_of_the_first(world: Any, settings: Any) -> list[Any]:
    """Three events of a key, of which the first was begun twice by processes that ended."""
    return await _begun_and_never_ended(world, settings, count=3, begun={0: 2})


async def _begun_and_never_ended(world: Any, settings: Any, *, count: int, begun: dict[int, int]) -> list[Any]:
    """Events of a key, and notes of owners that died: how often they had begun an event alone, by its number."""
    async with world.log_worker(settings=settings) as worker:
        await until(lambda: worker.stats().partitions, what="the consumer is known")
        partitions = worker.stats().partitions
    events: list[Any] = await world.publish(count, keys=1)
    for number, attempts in begun.items():
        await world.pool.fetch(
            "INSERT INTO soma.consumer_attempts"
            " SELECT c.consumer_id, $1, e.key_hash & $2, e.position, $4"
            " FROM soma.consumers c, soma.events e WHERE e.event_id = $3",
            next(iter(partitions)).name, len(partitions) - 1, events[number].event_id, attempts,
        )  # fmt: skip
    return events


async def _attempts(world: Any) -> list[int]:
    rows = await world.pool.fetch("SELECT attempts FROM soma.consumer_attempts")
    return [attempts for (attempts,) in rows]


async def _handling(world: Any) -> bool:
    rows = await world.pool.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
        " AND (query LIKE '%effect%' OR query LIKE '%total%')"
    )
    return bool(rows[0][0])


async def _resolved(world: Any, count: int) -> bool:
    rows = await world.pool.fetch("SELECT count(*) FROM soma.dead_letters WHERE status = 'resolved'")
    return bool(rows[0][0] == count)


async def _blocked_or_applied(world: Any, events: list[Any]) -> bool:
    blocked = sum(1 for letter in await world.letters() if letter.letter.status == "blocked")
    return bool(blocked + await world.count() == len(events))


def _harmless(letter: Any) -> bytes:
    value: bytes = letter.value
    return value.replace(b'"n":%d' % KILLER, b'"n":1000')
