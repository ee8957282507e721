"""A consumer process like the others, over the log instead of Kafka."""

from __future__ import annotations

import asyncio
from pathlib import Path

from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool, PoolSettings
from tests.torture import mutants
from tests.torture.consumers import begin, consume
from tests.torture.settings import LOG_CONSUMER, Settings, dsn


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings = Settings.load(folder)
    mutants.apply(settings.mutant, folder)
    async with Pool(PoolSettings(dsn(folder), size=9)) as pool:
        source = LogSource(pool, LOG_CONSUMER, LogSettings(lease=settings.lease, most_idle=0.1))
        await consume(folder, LOG_CONSUMER, f"{name}.{life}", source, pool, settings)


if __name__ == "__main__":
    asyncio.run(main(*begin()))
