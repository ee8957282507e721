"""During a failover the address may lead to a standby that is not promoted yet: that passes, like any outage."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.errors import DatabaseUnavailable
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.run import apply_migrations


async def test_a_standby_is_unavailable_until_it_is_promoted() -> None:
    with PostgresServer.start() as primary:
        await asyncio.to_thread(apply_migrations, primary.dsn)
        standby = await asyncio.to_thread(primary.standby)
        with standby:
            async with Pool(standby.dsn) as pool:
                shards = Shards(pool, "reader", "worker")
                with pytest.raises(DatabaseUnavailable, match="read-only"):
                    await shards.register(1)
                store = EventStore(pool, AppendSettings(service_id="test"))
                event = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="test.failover")
                publishing = asyncio.create_task(store.publish(event))
                await asyncio.to_thread(standby.promote)
                assert [recorded.version for recorded in await publishing] == [1]
