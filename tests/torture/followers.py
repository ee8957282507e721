"""A reader of the log whose cursor lives in a file of its own, outside the database."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from soma_common.errors import DatabaseUnavailable
from soma_common.events.store import EventStore
from soma_common.postgres.cursor import BEGINNING, Cursor
from soma_common.postgres.pool import Pool, PoolSettings
from tests.torture import mutants
from tests.torture.children import die_with_parent, until_terminated
from tests.torture.journal import Journal, read, trim
from tests.torture.settings import Settings, append_settings, dsn


def journal_of(folder: Path, name: str) -> Path:
    """Where a follower notes each event, together with the cursor after it."""
    return folder / f"{name}.follower.jsonl"


async def follow(store: EventStore, journal: Journal, start: Cursor) -> Cursor:
    """Note events until the database goes away; the cursor reached."""
    try:
        async for event, cursor in store.subscribe(after=start, page=200, most_idle=0.05):
            line = {"e": str(event.event_id), "k": str(event.stream), "v": event.version, "c": str(cursor)}
            journal.write(line)
            start = cursor
    except DatabaseUnavailable:
        await asyncio.sleep(0.1)
    return start


async def main(folder: Path, name: str) -> None:
    """The process."""
    settings, path = Settings.load(folder), journal_of(folder, name)
    mutants.apply(settings.mutant, folder)
    trim(path)
    cursor = BEGINNING
    for line in read(path) if path.exists() else ():
        cursor = Cursor.parse(line["c"])
    journal = Journal(path)
    async with Pool(PoolSettings(dsn(folder), size=2)) as pool:
        store = EventStore(pool, append_settings(settings))
        while True:
            cursor = await follow(store, journal, cursor)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(until_terminated(main(Path(sys.argv[1]), sys.argv[2])))
