"""A delivery ends well, or leaves nothing behind: wherever its worker dies."""

from __future__ import annotations

import asyncpg

from parcels.app import TABLES
from parcels.delivery import Delivery, deliver, drivers
from soma_common.testing.sagas import Crash, Point, SagaTestKit


async def _tours(dsn: str) -> list[str]:
    connection = await asyncpg.connect(dsn)
    try:
        return [row[0] for row in await connection.fetch("SELECT parcel FROM tours ORDER BY parcel")]
    finally:
        await connection.close()


async def _tables(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLES)
    await connection.close()


async def test_it_survives_every_crash(soma_database: str) -> None:
    await _tables(soma_database)
    drivers.clear()
    async with SagaTestKit(soma_database, deliver) as kit:
        crashes = list(kit.crash_points(deliver))
        for number, crash in enumerate(crashes):
            run = await kit.run(deliver, Delivery(f"p-{number:03}"), crash)
            assert run.status == "completed", crash
        assert len(await _tours(soma_database)) == len(drivers) == len(crashes) > 10


async def test_nobody_at_home(soma_database: str) -> None:
    await _tables(soma_database)
    drivers.clear()
    async with SagaTestKit(soma_database, deliver) as kit:
        run = await kit.run(deliver, Delivery("p-1", at_home=False), Crash("call-driver", Point.AFTER_EFFECT))
        assert run.status == "compensated"
        assert run.undone == ["call-driver", "join-tour"]
    assert await _tours(soma_database) == []
    assert drivers == {}
