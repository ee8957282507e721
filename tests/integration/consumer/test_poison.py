"""Events that end the process which handles them: by a signal, a crash in native code, an exit that nobody catches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


async def _resolved(world: Any, count: int) -> bool:
    rows = await world.pool.fetch("SELECT count(*) FROM soma.dead_letters WHERE status = 'resolved'")
    return bool(rows[0][0] == count)


async def _blocked_or_applied(world: Any, events: list[Any]) -> bool:
    blocked = sum(1 for letter in await world.letters() if letter.letter.status == "blocked")
    return bool(blocked + await world.count() == len(events))


def _harmless(letter: Any) -> bytes:
    value: bytes = letter.value
    return value.replace(b'"n":%d' % KILLER, b'"n":1000')
