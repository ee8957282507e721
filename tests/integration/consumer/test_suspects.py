"""Single file: what waits, what is begun, and that nothing overtakes it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg

from soma_common.consumer.attempts import Attempts
from soma_common.consumer.positions import Positions
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Record
from soma_common.consumer.suspects import Suspects
from soma_common.inbox import consumer_id
from soma_common.tasks import end
from tests.waiting import until

SUSPECT, OTHER = Partition("consumer:billing", 0), Partition("consumer:billing", 1)
NOTE = "INSERT INTO soma.consumer_attempts VALUES ($1, $2, $3, $4, 0)"


def record(partition: Partition, offset: int) -> Record:
    """A place that is to be worked on."""
    return Record(partition, offset, 1, offset, None)


async def test_what_comes_while_others_are_being_begun_does_not_overtake_them(world: Any, soma_database: str) -> None:
    """Though by then no partition is suspect any more."""
    number, positions = await consumer_id(world.pool, "billing"), Positions(100, 1_000_000)
    handed: list[int] = []
    attempts = Attempts(world.pool, number, set())
    suspects = Suspects(
        attempts, positions, ConsumerSettings(ahead=1),
        hand_out=lambda records: handed.extend(r.offset for r in records), condemn=lambda *_: None,
    )  # fmt: skip

    async def fetched(records: Sequence[Record]) -> None:  # as a session does
        await suspects.look(records)
        positions.open(records)
        handed.extend(r.offset for r in suspects.sift(records))

    def settle(*records: Record) -> None:
        positions.settle(records)
        suspects.settled()

    first, late = [record(OTHER, 2), record(OTHER, 3)], record(OTHER, 4)
    await world.pool.fetch(NOTE, number, *SUSPECT, 1)  # somebody died with this one
    other = await asyncpg.connect(soma_database)
    running = asyncio.create_task(suspects.run())
    try:
        await fetched([record(SUSPECT, 1), *first])
        await until(lambda: handed == [1], what="the suspect is handed out")
        blocking = other.transaction()
        await blocking.start()
        await other.execute(NOTE, number, *OTHER, 2)  # so that the next two take a while to begin
        settle(record(SUSPECT, 1))
        await until(lambda: _waits_for(world, other.get_server_pid()), what="the others are being begun")
        assert suspects.partitions == frozenset()
        await fetched([late])
        assert handed == [1]
        await blocking.rollback()
        await until(lambda: handed == [1, 2, 3], what="they are handed out")
        settle(*first)
        await until(lambda: handed == [1, 2, 3, 4], what="and then what came meanwhile")
        settle(late)
        await until(lambda: _no_notes(world), what="all notes are taken back")
    finally:
        await end(running)
        await other.close()


async def _waits_for(world: Any, pid: int) -> bool:
    rows = await world.pool.fetch("SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))", pid)
    return bool(rows[0][0])


async def _no_notes(world: Any) -> bool:
    return not await world.pool.fetch("SELECT FROM soma.consumer_attempts")
