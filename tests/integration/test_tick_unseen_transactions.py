"""A transaction above a plain snapshot's xmax runs unlisted and may hold positions: a tick lists it."""

from __future__ import annotations

import asyncpg

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.cursor import BEGINNING
from soma_common.postgres.pool import Pool


async def test_the_newest_transaction_running_at_a_tick_is_read_once_it_commits(soma_database: str) -> None:
    async with Pool(soma_database) as pool:
        store = EventStore(pool, AppendSettings(service_id="test"))
        writer = await asyncpg.connect(soma_database)
        transaction = writer.transaction()
        await transaction.start()
        published = await store.publish(
            Event(payload={}, tenant_id="t", aggregate_id="a", event_type="test.late"), tx=writer
        )
        seen = await store.ticks.latest()
        diff = await store.ticks.next_diff(BEGINNING, seen)
        assert diff is not None
        assert published.transaction_id is not None
        assert str(published.transaction_id) in seen.running  # the tick lifted its xmax above it
        assert await store.log_page(diff, 10) == []
        await transaction.commit()
        later = await store.ticks.next_diff(diff.done(), await store.ticks.latest())
        assert later is not None
        assert [row[2] for row in await store.log_page(later, 10)] == [published[0].event_id]
        await writer.close()
