"""A transaction whose rows lie on both sides of a partition's end, cleaned around while it runs."""

from __future__ import annotations

import asyncpg

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from tests.waiting import until

EDGE = 1 << 17


def _event() -> Event:
    return Event(payload={}, tenant_id="t", aggregate_id="a", event_type="test.edge")


async def test_rows_of_a_late_commit_stay_until_every_cursor_has_passed_them(soma_database: str) -> None:
    async with Pool(soma_database) as pool:
        store = EventStore(pool, AppendSettings(service_id="test", route=lambda event: "topic"))
        shards = Shards(pool, "relay:edge", "worker", lease=60.0)
        await shards.register(8)
        await shards.share()
        await pool.fetch("SELECT setval('soma.event_position', $1)", EDGE - 3)
        await store.publish(_event())
        writer = await asyncpg.connect(soma_database)
        transaction = writer.transaction()
        await transaction.start()
        late = await store.publish([_event(), _event()], tx=writer)
        assert [event.position for event in late] == [EDGE - 1, EDGE]
        await pool.fetch("SELECT soma.clean_outbox()")  # notes that the sequence has left the partition
        diff = await store.ticks.next_diff(shards.owned[0].cursor, await store.ticks.latest())
        assert diff is not None
        await shards.save(dict.fromkeys(shards.owned, diff.done()))
        await transaction.commit()
        await pool.fetch("SELECT soma.clean_outbox()")
        rows = await pool.fetch("SELECT position FROM soma.outbox WHERE position >= $1 ORDER BY 1", EDGE - 1)
        assert [row[0] for row in rows] == [EDGE - 1, EDGE]

        async def emptied() -> bool:
            # Transactions of the cluster's other databases hold the oldest transaction id back too.
            await _pass(store, shards)
            await pool.fetch("SELECT soma.clean_outbox()")
            return bool((await pool.fetch("SELECT count(*) FROM soma.outbox_0"))[0][0] == 0)

        await until(emptied)
        await writer.close()


async def _pass(store: EventStore, shards: Shards) -> None:
    """Every cursor to the newest tick, made by an event of now."""
    await store.publish(_event())
    tick = await store.ticks.latest()
    states = await shards.states()
    diff = await store.ticks.next_diff(states[0].cursor, tick)
    assert diff is not None
    await shards.save(dict.fromkeys(shards.owned, diff.done()))
