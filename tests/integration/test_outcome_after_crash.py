"""A COMMIT that a crash swallowed: its transaction id is handed out again, to somebody else."""

from __future__ import annotations

import asyncio

import asyncpg

from soma_common.events.append import AppendSettings, Published
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.run import apply_migrations


async def test_a_reused_transaction_id_is_not_taken_for_the_lost_one() -> None:
    with PostgresServer.start(settings={"wal_writer_delay": "10s"}) as server:
        await asyncio.to_thread(apply_migrations, server.dsn)
        async with Pool(server.dsn) as pool:
            store = EventStore(pool, AppendSettings(service_id="test"))
            lost = await _publish_until_the_crash(store, server)
            assert not await store.outcome(lost)  # its id is still ahead of the cluster's
            assert lost.transaction_id is not None
            while await _commit_another(server.dsn) < lost.transaction_id:
                pass
            assert not await store.outcome(lost)  # another transaction of that id has committed


async def _publish_until_the_crash(store: EventStore, server: PostgresServer) -> Published:
    connection = await asyncpg.connect(server.dsn)
    await connection.transaction().start()
    event = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="test.lost")
    published = await store.publish(event, tx=connection)
    server.kill()
    connection.terminate()
    server.start_again()
    return published


async def _commit_another(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("SELECT pg_current_xact_id()::text"))
    finally:
        await connection.close()
