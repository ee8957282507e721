"""Forward-only migrations: numbered SQL files, one lock, checksums."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from soma_common.errors import MigrationError
from soma_common.postgres.errors import translated
from soma_common.retry import Backoff
from soma_common.sql.loader import Migration, blocks, migrations

# A migration that needs a strong lock gives up after this long and tries again, so that it never makes writers queue.
LOCK_TIMEOUT = "500ms"
LOCK_ATTEMPTS = 60


@dataclass(frozen=True, slots=True)
class Applied:
    """A migration and when it was applied (None: not yet)."""

    version: int
    name: str
    applied_at: datetime | None


async def upgrade(dsn: str, *, grant_to: str | None = None) -> list[str]:
    """Apply what is missing, each file in a transaction of its own; the names of the new ones.

    Safe to call from several processes at once and while writers run.

    Raises:
        MigrationError: an applied file was changed since, the database is newer than this library, or a lock could
            not be had.
        DatabaseUnavailable: no connection.
    """
    async with _connect(dsn) as connection:
        await connection.execute(_sql("lock"))
        try:
            if not await connection.fetchval(_sql("exists")):
                await connection.execute(_sql("create"))
            missing = _missing(await connection.fetch(_sql("applied")))
            for migration in missing:
                await _apply(connection, migration)
            if grant_to is not None:
                await connection.execute(_sql("grant"), grant_to)
        finally:
            if not connection.is_closed():
                await connection.execute(_sql("unlock"))
    return [f"{migration.version:04d}_{migration.name}" for migration in missing]


async def status(dsn: str) -> list[Applied]:
    """Every known migration, with the time it was applied."""
    async with _connect(dsn) as connection:
        rows = await connection.fetch(_sql("applied")) if await connection.fetchval(_sql("exists")) else []
    _missing(rows)
    when = {row["version"]: row["applied_at"] for row in rows}
    return [Applied(m.version, m.name, when.get(m.version)) for m in migrations()]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did: positions up to ``history_until`` are history; a new era of transaction ids begins there."""

    old_cluster: int
    new_cluster: int
    history_until: int
    new_era: int


async def repair(dsn: str) -> Repaired:
    """Start a new era of transaction ids after a dump was restored or the database was copied. Nothing is lost."""
    async with _connect(dsn) as connection:
        return Repaired(*(await connection.fetchrow(_sql("repair"))))


async def _apply(connection: Any, migration: Migration) -> None:
    for attempt, delay in enumerate(Backoff(base=0.1, maximum=2.0).delays()):
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
                await connection.execute(migration.sql)
                await connection.execute(_sql("record"), migration.version, migration.name, _checksum(migration))
            return
        except Exception as error:
            if getattr(error, "sqlstate", None) not in ("55P03", "40P01") or attempt >= LOCK_ATTEMPTS:
                raise MigrationError(
                    f"Migration {migration.version:04d}_{migration.name} failed and was rolled back: {error}.",
                    cure="end long transactions on the soma schema, check the role's rights, and run it again.",
                ) from error
        await asyncio.sleep(delay)


def _missing(applied: list[Any]) -> list[Migration]:
    """The migrations that are not applied yet; the applied ones are checked against the files."""
    known = {migration.version: migration for migration in migrations()}
    for row in applied:
        migration = known.pop(row["version"], None)
        if migration is None:
            raise MigrationError(
                f"The database has migration {row['version']} ({row['name']}), which this version does not know.",
                cure="install the soma-common version that the database was upgraded with, or a newer one.",
            )
        if row["checksum"] != _checksum(migration):
            raise MigrationError(
                f"Migration {migration.version:04d}_{migration.name} was changed after it was applied.",
                cure="restore the released file; changes go into a new migration.",
            )
    return list(known.values())


def _checksum(migration: Migration) -> str:
    return hashlib.sha256(migration.sql.encode()).hexdigest()


def _sql(name: str) -> str:
    return blocks("migrate")[name]


@asynccontextmanager
async def _connect(dsn: str) -> AsyncIterator[Any]:
    import asyncpg

    with translated():
        connection = await asyncpg.connect(dsn, timeout=10, server_settings={"application_name": "soma-migrate"})
        try:
            yield connection
        finally:
            await connection.close(timeout=5)
