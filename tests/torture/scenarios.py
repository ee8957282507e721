"""Scripted runs: each walks into the hole that one broken promise leaves. Run whole, each must pass the checker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import psutil

from soma_common.events.append import Published
from soma_common.events.keys import kafka_key
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.outbox.groups import GROUPS
from soma_common.outbox.relay import identities
from soma_common.postgres.pool import Pool
from tests.torture import gather
from tests.torture.children import Child
from tests.torture.mutants import (
    DIE_BEFORE_COMMIT,
    DIE_IN_HANDLER,
    STOP_BEFORE_COMMIT,
    STOP_WHILE_OPENING,
    ZOMBIE_IS_DONE,
)
from tests.torture.run import until
from tests.torture.settings import append_settings
from tests.torture.units import Unit, Work
from tests.torture.world import World

PATIENCE = 40.0  # seconds for anything to happen
SETTLE = 10.0  # seconds that a broken library gets to bring what it still may
EDGE = 1 << 17  # positions in one partition of the outbox


@dataclass(slots=True)
class Open:
    """A transaction of the script that has not ended yet."""

    unit: Unit
    connection: Any
    transaction: Any
    done: Published = field(default_factory=Published)


class Hand:
    """A writer that does what the script says; its journal is the checker's, like every writer's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.work = Work(world.folder, "hand", 1)
        self.events: list[Event] = []

    async def begin(self, key: str, *, events: int = 1, weak: bool = False, fate: str | None = None) -> Open:
        """Publish in a transaction that stays open; the first event has the fate."""
        unit = self.work.unit()
        fates = [fate, *[None] * (events - 1)]
        unit.events = [self.work.event(unit, key, fact=False, follow=False, fate=each) for each in fates]
        unit.weak = weak
        self.work.begins(unit)
        connection = await asyncpg.connect(self._world.database.dsn)
        open_one = Open(unit, connection, connection.transaction())
        await open_one.transaction.start()
        if weak:
            await connection.execute("SET LOCAL synchronous_commit = off")
        async with Pool(self._world.database.dsn) as pool:
            open_one.done = await EventStore(pool, append_settings(self.work.settings)).publish(
                unit.events, tx=connection
            )
        return open_one

    async def commit(self, open_one: Open) -> None:
        """End it."""
        await open_one.transaction.commit()
        await open_one.connection.close()
        self.work.ends(open_one.unit, open_one.unit.events)
        self.events += open_one.unit.events

    async def roll_back(self, open_one: Open) -> None:
        """End it without a trace."""
        await open_one.transaction.rollback()
        await open_one.connection.close()
        self.work.ends(open_one.unit, [])

    async def write(self, key: str, *, events: int = 1, weak: bool = False, fate: str | None = None) -> None:
        """A whole transaction."""
        await self.commit(await self.begin(key, events=events, weak=weak, fate=fate))


async def late_commit(world: World, hand: Hand) -> None:
    """A low position commits after a higher one was read."""
    reader = world.add("followers", "follower")
    late = await hand.begin("late")
    await hand.write("early")
    await _met(world, reader, 1)
    await hand.commit(late)
    await hand.write("later")
    await _settle(world, reader, 3)


async def reader_restart(world: World, hand: Hand) -> None:
    """A reader's process ends; the next one goes on from the cursor that was kept."""
    reader = world.add("followers", "follower")
    for number in range(3):
        await hand.write(f"k{number}")
    await _met(world, reader, 3)
    reader.kill()
    await hand.write("k0")
    reader.start()
    await _settle(world, reader, 4)


async def crash_after_rollbacks(world: World, hand: Hand) -> None:
    """Transactions that left no durable trace move the transaction ids; then the database crashes."""
    reader = world.add("followers", "follower")
    await hand.write("k0")
    await _met(world, reader, 1)
    for _ in range(20):
        await hand.roll_back(await hand.begin("k1"))
    await hand.write("k2", weak=True)
    await _met(world, reader, 2)
    await asyncio.to_thread(world.database.restart, "immediate")
    for number in range(30):
        await hand.write(f"k{number % 3}")
    await _settle(world, reader, 32)


async def two_tick_makers(world: World, hand: Hand) -> None:
    """One tick maker dawdles while another is quicker."""
    reader = world.add("followers", "follower")
    await hand.write("k0")
    await _met(world, reader, 1)
    gate = await asyncpg.connect(world.database.dsn)
    slow = await asyncpg.connect(world.database.dsn)
    await gate.execute("SELECT pg_advisory_lock(4711)")
    running = await hand.begin("k1")
    await hand.write("k2")  # so that the running one is below every snapshot's xmax
    await slow.execute("SET torture.dawdle = 'yes'")
    dawdling = asyncio.create_task(slow.fetch("SELECT tick_id FROM soma.tick('0')"))
    await asyncio.sleep(0.3)  # the whole library has nothing to wait for here, a broken one is at the gate now
    await hand.commit(running)
    await _met(world, reader, 3)
    await gate.execute("SELECT pg_advisory_unlock(4711)")
    await dawdling
    await asyncio.sleep(1.0)  # the reader takes up the tick that was stored last
    await hand.write("k3")
    await _settle(world, reader, 4)
    await slow.close()
    await gate.close()


async def broker_dies(world: World, hand: Hand) -> None:
    """The broker dies with rows on their way, and the relay with it."""
    assert world.kafka is not None
    relay = world.add("relays", "relay0")
    await hand.write("k0", events=5)
    await _in_kafka(world, 5)
    world.kafka.kill()
    await hand.write("k0", events=5)
    await asyncio.sleep(2.0)  # nothing to wait for: nobody may note anything as done meanwhile
    relay.kill()
    await asyncio.to_thread(world.kafka.start_again)
    relay.start()
    await hand.write("k0", events=5)
    await _settle(world, None, 15)


async def zombie_relay(world: World, hand: Hand) -> None:
    """A relay stops just before its COMMIT, loses its lease, and wakes."""
    zombie = await _relay_before_commit(world, hand)
    heir = world.add("relays", "relay1")
    await _in_kafka(world, 15, committed=False)  # the heir has sent what the zombie has in its hands
    await _wake(world, zombie)
    await _settle(world, None, 10)
    assert heir.running


async def slow_takeover(world: World, hand: Hand) -> None:
    """An heir is slow between its two first steps; meanwhile the former owner's COMMIT arrives."""
    zombie = await _relay_before_commit(world, hand)
    _, key_hash = kafka_key(hand.events[0].stream)
    (world.folder / STOP_WHILE_OPENING).write_text(identities()[key_hash % GROUPS])
    heir = world.add("relays", "relay1")
    await _stopped(heir)
    await _wake(world, zombie)
    zombie.kill()
    heir.paused = True
    heir.resume()
    await hand.write("k0", events=5)
    await _settle(world, None, 15)


async def _relay_before_commit(world: World, hand: Hand) -> Child:
    """A relay that has stopped itself with five events in a transaction, five others behind it."""
    zombie = world.add("relays", "relay0")
    await hand.write("k0", events=5)
    await _in_kafka(world, 5)
    (world.folder / STOP_BEFORE_COMMIT).touch()
    await hand.write("k0", events=5)
    await _stopped(zombie)
    return zombie


async def death_in_handler(world: World, hand: Hand) -> None:
    """A consumer dies in the middle of a batch."""
    await _death(world, hand, DIE_IN_HANDLER)


async def death_before_commit(world: World, hand: Hand) -> None:
    """A consumer dies when everything is written, just before COMMIT."""
    await _death(world, hand, DIE_BEFORE_COMMIT)


async def _death(world: World, hand: Hand, place: str) -> None:
    world.add("relays", "relay0")
    consumer = world.add("consumers", "consumer0")
    await hand.write("k0", events=5)
    await _applied(world, 5)
    (world.folder / place).touch()
    await hand.write("k0", events=5)
    await asyncio.to_thread(until, lambda: not consumer.running, PATIENCE, f"the consumer reaches {place}")
    consumer.kill()
    consumer.start()
    await hand.write("k0", events=5)
    await _settle(world, None, 15)


async def failing_event(world: World, hand: Hand) -> None:
    """An event fails until its letter is mended, and others of its key follow it."""
    world.add("relays", "relay0")
    world.add("consumers", "consumer0")
    world.add("operators", "operator0")
    await hand.write("k0", events=5)
    await _applied(world, 5)
    await hand.write("k0", events=3, fate="broken")
    for _ in range(20):
        await hand.write("k0")
        await asyncio.sleep(0.03)
    await _settle(world, None, 28)


async def late_commit_at_the_edge(world: World, hand: Hand) -> None:
    """The positions leave a partition of the outbox while a transaction still holds one there."""
    connection = await asyncpg.connect(world.database.dsn)
    await connection.execute("SELECT setval('soma.event_position', $1)", EDGE - 4)
    world.add("relays", "relay0")
    await hand.write("k0", events=2)
    late = await hand.begin("late")
    await hand.write("k1", events=5)
    await _in_kafka(world, 7)
    assert late.done[0].position == EDGE - 1
    await asyncio.sleep(3.0)  # the relay cleans every second
    await hand.commit(late)
    await hand.write("k1", events=3)
    await _settle(world, None, 11)
    await connection.close()


Scenario = Callable[[World, Hand], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a scenario needs.

    ``young``: how long a tick serves everybody who asks, where it matters. ``lease`` (seconds): longer where a process
    that stops for a while must keep what it has claimed.
    """

    play: Scenario
    kafka: bool = True
    exactly_once: bool = False
    young: str | None = None
    lease: float = 2.0


STAGES: Mapping[str, Stage] = {
    "late_commit": Stage(late_commit, kafka=False),
    "reader_restart": Stage(reader_restart, kafka=False),
    "crash_after_rollbacks": Stage(crash_after_rollbacks, kafka=False),
    "two_tick_makers": Stage(two_tick_makers, kafka=False, young="300 milliseconds"),
    "broker_dies": Stage(broker_dies),
    "zombie_relay": Stage(zombie_relay, exactly_once=True),
    "slow_takeover": Stage(slow_takeover, exactly_once=True, lease=8.0),
    "death_in_handler": Stage(death_in_handler),
    "death_before_commit": Stage(death_before_commit),
    "failing_event": Stage(failing_event),
    "late_commit_at_the_edge": Stage(late_commit_at_the_edge),
}


async def _met(world: World, reader: Child, events: int) -> None:
    """Until a follower has noted so many events."""
    await asyncio.to_thread(
        until, lambda: len(gather.followed(world.folder, [reader.name])[reader.name]) >= events, PATIENCE,
        f"{reader.name} meets {events} events",
    )  # fmt: skip


async def _in_kafka(world: World, records: int, *, committed: bool = True) -> None:
    end = time.monotonic() + PATIENCE
    while len(await gather.kafka(world.settings.bootstrap, committed=committed)) < records:
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {records} records in Kafka")
        await asyncio.sleep(0.1)


async def _applied(world: World, events: int) -> None:
    end = time.monotonic() + PATIENCE
    while await gather.count(world.database.dsn, "effects") < events:
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {events} effects")
        await asyncio.sleep(0.1)


async def _stopped(child: Child) -> None:
    """Until a process has stopped itself."""
    assert child.process is not None
    process = psutil.Process(child.process.pid)
    await asyncio.to_thread(
        until, lambda: process.status() == psutil.STATUS_STOPPED, PATIENCE, f"{child.name} stops itself"
    )


async def _wake(world: World, zombie: Child) -> None:
    """Until its COMMIT has arrived or was refused."""
    zombie.paused = True
    zombie.resume()
    await asyncio.to_thread(until, (world.folder / ZOMBIE_IS_DONE).exists, PATIENCE, f"{zombie.name} goes on")


async def _settle(world: World, reader: Child | None, events: int) -> None:
    """Until everything has arrived, as it does with the whole library; a mutant's loss is for the checker to name."""
    end = time.monotonic() + (PATIENCE if world.settings.mutant is None else SETTLE)
    while time.monotonic() < end and not await _there(world, reader, events):
        await asyncio.sleep(0.1)
    for child in world.children:
        if child.process is not None and child.process.poll() not in (None, 0):
            child.revive()


async def _there(world: World, reader: Child | None, events: int) -> bool:
    if reader is not None:
        return len(gather.followed(world.folder, [reader.name])[reader.name]) >= events
    if world.of("consumers"):
        return await gather.count(world.database.dsn, "effects") >= events
    return len({record.event_id for record in await gather.kafka(world.settings.bootstrap)}) >= events
