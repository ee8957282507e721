"""Benchmark: what it costs to let rows go, in time and in write-ahead log, beside a plain DELETE of the same rows.

Whole partitions are dropped or emptied (the log, the inbox), the rest goes in small batches. ``plain DELETE`` is one
long statement on a copy with the same indexes, and the VACUUM that gives its space back: what retention must never do.

Run: ``python -m benchmarks.retention``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.reporting import report
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.removing import Gently
from soma_common.retention.running import RetentionRun, RetentionSettings
from soma_common.retention.storage import FolderStorage
from soma_common.testing.lane.postgres import PostgresServer

ROWS = int(os.environ.get("SOMA_BENCH_RETENTION", "100000"))
MONTH = timedelta(days=30)
END_OF_FIRST = 5_000_000  # the first partition of the log ends here
SETTINGS = RetentionSettings(gently=Gently(pause=0.0))


async def main() -> None:
    """Measure each way once: the figures are counts of bytes, which do not vary."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer.start(18))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soma-bench-")))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn)) as pool:
            bench = _Bench(pool, folder)
            await bench.fill()
            rows = [
                await bench.measured("log", "one type of two, in batches", ROWS // 2, bench.thinned),
                await bench.measured("log", "whole partition, archived and dropped", ROWS, bench.dropped),
                await bench.measured("log", "plain DELETE", ROWS, lambda: bench.deleted("events_copy")),
                await bench.measured("inbox", "whole partition, emptied", ROWS, bench.emptied),
                await bench.measured("inbox", "plain DELETE", ROWS, lambda: bench.deleted("inbox_copy")),
                await bench.measured("idempotency keys", "in batches", ROWS // 2, bench.swept),
                await bench.measured("idempotency keys", "plain DELETE", ROWS // 2, lambda: bench.deleted("keys_copy")),
            ]
            archived = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"Archives: {archived / (ROWS + ROWS // 2):.0f} bytes per event.")
    report("retention", f"Letting {ROWS:,} rows go", rows)


class _Bench:
    """A log with two partitions, an inbox and keys; and copies of them."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._dsn = pool.settings.dsn

    async def fill(self) -> None:
        """The first partition has one type, the second two; every other event of the second has a key."""
        async with self._pool.connection() as connection:
            await connection.execute(f"SELECT setval('soma.event_position', {END_OF_FIRST - ROWS - 1})")
            await connection.execute(f"SELECT soma.maintain_events({ROWS})")
        store = EventStore(self._pool, AppendSettings("bench"))
        for start in range(0, 2 * ROWS + 500, 500):
            first = start < ROWS
            await store.publish(
                Event(
                    payload={"n": n, "text": "as long as a short message"}, tenant_id="bench",
                    aggregate_id=f"k-{n % 1000}",
                    event_type="bench.first" if first else "bench.old" if n % 2 else "bench.kept",
                    idempotency_key=f"key-{n}" if not first and n % 2 == 0 else None,
                )
                for n in range(start, start + 500)
            )  # fmt: skip
            if start % 10_000 == 0:
                await self._pool.fetch(f"SELECT soma.maintain_events({ROWS})")
        async with self._pool.connection() as connection:
            await connection.execute(
                """INSERT INTO soma.consumers (name) VALUES ('bench');
                INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
                SELECT event_id, (SELECT consumer_id FROM soma.consumers), tenant_id, service_id FROM soma.events"""
                f" ORDER BY position LIMIT {ROWS}"
            )
            for name, source in (("events", "events_p0"), ("inbox", "inbox_first"), ("keys", "idempotency_keys")):
                await connection.execute(f"CREATE TABLE {name}_copy (LIKE soma.{source} INCLUDING ALL)")
                await connection.execute(f"INSERT INTO {name}_copy SELECT * FROM soma.{source}")
        await self._retain(RetentionPolicy(inbox=MONTH), 0)  # from here on the inbox has partitions by time

    async def measured(
        self, table: str, how: str, rows: int, letting_go: Callable[[], Awaitable[None]]
    ) -> dict[str, Any]:
        """Time and WAL of one way."""
        async with self._pool.connection() as connection:
            await connection.execute("CHECKPOINT")
            before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            start = time.perf_counter()
            await letting_go()
            took = time.perf_counter() - start
            wal = float(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", before))
        return {
            "table": table, "how": how, "rows": rows, "rows/s": rows / took,
            "WAL MB per million rows": wal / rows,
        }  # fmt: skip

    async def thinned(self) -> None:
        """One of two types leaves the second partition."""
        await self._retain(RetentionPolicy(events={"bench.old": MONTH}), 40)

    async def dropped(self) -> None:
        """The first partition goes as a whole."""
        await self._retain(RetentionPolicy(events={"bench.first": MONTH}), 40)

    async def emptied(self) -> None:
        """The inbox before now."""
        await self._retain(RetentionPolicy(inbox=MONTH), 40)

    async def swept(self) -> None:
        """Keys that callers gave."""
        await self._retain(RetentionPolicy(idempotency_keys=MONTH), 40)

    async def deleted(self, copy: str) -> None:
        """The plain way."""
        async with self._pool.connection() as connection:
            await connection.execute(f"DELETE FROM {copy}")
            await connection.execute(f"VACUUM {copy}")

    async def _retain(self, policy: RetentionPolicy, days: int) -> None:
        async with Pool(PoolSettings(self._dsn, settings={"soma.clock_offset": f"{days} days"})) as later:
            done = await RetentionRun(
                later, policy, FolderStorage(self._folder), who="benchmark", settings=SETTINGS
            ).run()
        if done.waiting:
            raise SystemExit(f"Retention waits: {done.waiting}")


if __name__ == "__main__":
    asyncio.run(main())
