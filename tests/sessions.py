"""What the other sessions of a test's own database do. Tests share a server and run side by side: never look at all."""

from __future__ import annotations

import asyncpg

SESSIONS = "(SELECT * FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()) AS sessions"
"""Read it FROM, in place of ``pg_stat_activity``."""

WAITING_LOCKS = f"(SELECT * FROM pg_locks JOIN {SESSIONS} USING (pid) WHERE NOT granted) AS waiting_locks"
"""Read it FROM, in place of ``pg_locks``: the locks that sessions wait for."""


async def cut_all(dsn: str) -> None:
    """End every session of a database."""
    connection = await asyncpg.connect(dsn)
    await connection.fetch(f"SELECT pg_terminate_backend(pid) FROM {SESSIONS}")
    await connection.close()
