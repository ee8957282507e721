"""A publish that was made before looks up its own events, whatever the planner knows of the tables."""

from __future__ import annotations

from uuid import uuid4

import pytest

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool

LOG = 6_000
SOME = 10
# What a look-up by a unique index may cost: the rows themselves, a few dead ones, and the partitions' roots.
MOST_READ = 40 * SOME

TUPLES_READ = """
SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'soma' AND relname ~ '^(events|idemp)')
     + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'soma' AND relname ~ '^(events|idemp)')
"""


def event(number: int, *, keyed: bool) -> Event:
    """One of many events of one tenant."""
    return Event(
        payload={"number": number}, event_type="thing.happened", tenant_id="one", aggregate_id=f"a{number % 50}",
        event_id=uuid4(), idempotency_key=f"k{number}" if keyed else None,
    )  # fmt: skip


async def tuples_read(pool: Pool) -> int:
    """Rows and index entries of the log that have been read so far, by every session."""
    async with pool.connection() as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        return int(await connection.fetchval(TUPLES_READ))


@pytest.mark.parametrize("keyed", [True, False], ids=["by idempotency key", "after an unknown outcome"])
async def test_duplicates_are_found_without_reading_the_tenant(soma_database: str, keyed: bool) -> None:
    async with Pool(soma_database) as pool:
        store = EventStore(pool, AppendSettings("service"))
        events = [event(number, keyed=keyed) for number in range(LOG)]
        for start in range(0, LOG, 1000):
            await store.publish(events[start : start + 1000])
        again = store.publish if keyed else store.publish_again
        before = await tuples_read(pool)
        assert (await again(events[:SOME])).transaction_id is None
        assert await tuples_read(pool) - before <= MOST_READ
