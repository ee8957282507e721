"""A connection to look at a database with: it starts nothing, and bears a pooler between."""

from __future__ import annotations

from typing import Any

from soma_common.config import SomaConfig
from soma_common.postgres.embedded import EmbeddedPostgres
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sql.loader import blocks


async def asked(pool: Pool, name: str, *args: Any, file: str = "doctor") -> list[Any]:
    """The rows of a named statement; their columns by name or number."""
    rows: list[Any] = await pool.fetch(blocks(file)[name], *args)
    return rows


def address(config: SomaConfig) -> str:
    """Of the database of the settings; the embedded one is not started for it."""
    return config.postgres_dsn or EmbeddedPostgres(config.folder).dsn


def unpooled(config: SomaConfig, within: float) -> Pool:
    """A pool that prepares nothing; ``within`` (seconds) bounds connecting.

    What else takes long is cancelled by whoever asks: a pooler refuses sessions with settings like statement_timeout.
    """
    settings = {"application_name": "somastack"}
    return Pool(PoolSettings(address(config), size=4, timeout=within, transaction_pooler=True, settings=settings))
