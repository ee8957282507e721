"""One retention run in a process of its own, for tests that kill it. Its one argument is a JSON object.

``die``: {"stage": a name below, "after": n}: SIGKILL itself when that stage is reached for the n-th time.
``limit``: bytes that a file of this process may have (RLIMIT_FSIZE), as a disk that is full.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retention.catalog import Archive, Catalog, Force, Partition
from soma_common.retention.manifest import NAME, Manifest
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.removing import Gently
from soma_common.retention.running import RetentionRun, RetentionSettings
from soma_common.retention.storage import FolderStorage

STAGES = ["opened", "half", "file", "manifest", "verified", "began", "dropped", "thinned", "removed"]


class Death:
    """Counts how often a stage was reached, and kills."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.stage, self.left = given.get("stage"), given.get("after", 1)

    def reached(self, stage: str) -> None:
        if stage == self.stage:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class DyingStorage(FolderStorage):
    def __init__(self, root: Path, death: Death) -> None:
        super().__init__(root)
        self.death = death

    def write(self, name: str, data: bytes) -> None:
        if self.death.stage == "half":
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0000.tmp").write_bytes(data[: len(data) // 2])
            self.death.reached("half")
        super().write(name, data)
        self.death.reached("manifest" if name.endswith(NAME) else "file")


class DyingCatalog(Catalog):
    death: Death

    async def open(self, partition: Partition, types: Any, *, whole: bool, location: str) -> Archive:
        archive = await super().open(partition, types, whole=whole, location=location)
        self.death.reached("opened")
        return archive

    async def verified(self, archive: Archive, manifest: Manifest, digest: str) -> None:
        await super().verified(archive, manifest, digest)
        self.death.reached("verified")

    async def begin(self, archive: Archive, force: Force | None) -> tuple[str, ...]:
        behind = await super().begin(archive, force)
        self.death.reached("began")
        return behind

    async def drop(self, archive: Archive) -> str:
        outcome = await super().drop(archive)
        self.death.reached("dropped")
        return outcome

    async def thin(self, archive: Archive, event_type: str, after: int, most: int) -> tuple[int, int | None]:
        found = await super().thin(archive, event_type, after, most)
        self.death.reached("thinned")
        return found

    async def removed(self, archive: Archive) -> None:
        await super().removed(archive)
        self.death.reached("removed")


async def main(given: dict[str, Any]) -> None:
    if "limit" in given:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given["limit"], given["limit"]))
    death = Death(given.get("die", {}))
    month = timedelta(days=30)
    policy = RetentionPolicy(default=month) if given["whole"] else RetentionPolicy(events={"telemetry.*": month})
    settings = RetentionSettings(
        gently=Gently(batch=10, pause=0.0), file_bytes=15_000, lease=given["lease"], patience=30.0
    )
    offset = {"soma.clock_offset": "60 days"}
    async with Pool(PoolSettings(given["dsn"], settings=offset)) as pool:
        storage = DyingStorage(Path(given["folder"]), death)
        run = RetentionRun(pool, policy, storage, who="program", settings=settings)
        run.catalog = DyingCatalog(pool, who="program", lease=given["lease"])
        run.catalog.death = death
        print("ready", flush=True)
        report = await run.run()
        print(len(report.removed), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
