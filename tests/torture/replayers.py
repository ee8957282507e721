"""A process that replays the log to the log's consumer, again and again, beside the live one: nothing may come of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from soma_common.errors import HandlerFailed, InfrastructureError, LeaseLost, ReplayRefused, TransactionConflict
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import ReplayFilter, ReplayMode, ReplayState
from tests.torture.children import until_terminated
from tests.torture.consumers import appending, begin, handlers_of
from tests.torture.journal import Journal
from tests.torture.settings import LOG_CONSUMER, Settings, append_settings, dsn

log = logging.getLogger(__name__)
_PASSING = (InfrastructureError, TransactionConflict, LeaseLost, ReplayRefused, HandlerFailed)


def journal_of(folder: Path, name: str) -> Path:
    """Where a replayer notes each run that it brought to its end."""
    return folder / f"{name}.replays.jsonl"


async def replay(engine: ReplayEngine, known: Path, journal: Journal) -> None:
    """Go on with the run that a former life of this process began, or begin one; bring it to its end."""
    if not known.exists():
        run = await engine.start(ReplayFilter(tenant_id=ALL_TENANTS), ReplayMode.MISSING)
        known.write_text(str(run.run_id))
    run_id = known.read_text()
    found = await engine.progress(run_id)
    if found.state in (ReplayState.FAILED, ReplayState.PAUSED):
        await engine.resume(run_id)
    if found.state is not ReplayState.DONE:
        async for progress in engine.run(run_id):
            found = progress
    if found.state is ReplayState.DONE:
        counts = found.counts
        journal.write({"run": run_id, "read": counts.read, "applied": counts.applied, "held": counts.held})
        known.unlink()


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings, known, journal = Settings.load(folder), folder / f"{name}.run", Journal(journal_of(folder, name))
    pool = PoolSettings(dsn(folder), size=3)
    handlers = handlers_of(LOG_CONSUMER, f"{name}.{life}", folder)
    async with Pool(pool) as publishing:
        append = appending(EventStore(publishing, append_settings(settings)))
        quick = ReplaySettings(batch=100, page=1000, lease=3.0, idle_timeout=4.0)
        while True:
            try:
                async with ReplayEngine(pool, LOG_CONSUMER, handlers=handlers, append=append, settings=quick) as engine:
                    while True:
                        await replay(engine, known, journal)
                        await asyncio.sleep(0.5)
            except _PASSING as error:
                log.info("replay: %s", error)
                if isinstance(error, ReplayRefused) and "There is no" in str(error):
                    known.unlink(missing_ok=True)  # a promotion took the run
                await asyncio.sleep(0.5)


if __name__ == "__main__":
    asyncio.run(until_terminated(main(*begin())))
