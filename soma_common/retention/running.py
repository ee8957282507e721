"""One retention run from plan to report, and the service that makes one every so often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

from soma_common.errors import (
    ArchiveCorrupt,
    ArchiveUnavailable,
    ConfigurationError,
    InfrastructureError,
    SomaError,
    TransactionConflict,
)
from soma_common.postgres.pool import Pool
from soma_common.ranges import check_settings
from soma_common.retention.catalog import Archive, ArchiveState, Catalog, Force, Partition
from soma_common.retention.exporting import Exporter
from soma_common.retention.planning import Action, RetentionPlan, Step, make_plan, plan_steps
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.removing import Gently, Remover
from soma_common.retention.storage import Storage
from soma_common.retention.sweeping import Sweeper
from soma_common.service import Service
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_MAINTENANCE: Final = ("maintain_events", "clean_outbox", "merge_ticks")
_LOOK: Final = 0.05  # seconds between two looks at what still runs


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """How runs work.

    Args:
        gently: batches, rests, tries for locks.
        file_bytes: about how large a file of an archive is before compression.
        lease: seconds after which another run may go on where a silent one was.
        every: seconds between two runs of the service.
        patience: seconds to wait for transactions that may still write into an old partition. A snapshot tells of those
            in all databases of the server.
    """

    gently: Gently = field(default_factory=Gently)
    file_bytes: int = 32 * 2**20
    lease: float = 30.0
    every: float = 900.0
    patience: float = 5.0

    def __post_init__(self) -> None:
        check_settings(
            self, gently=Gently, file_bytes=(1, 1 << 40), lease=(0.1, 86_400), every=(0.01, 30 * 86_400),
            patience=(0.0, 86_400),
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run did: archives whose events left the log, those that wait and for what, rows deleted by table."""

    removed: list[Archive] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    swept: dict[str, int] = field(default_factory=dict)
    stopped: bool = False


class _Stopped(Exception):
    """Somebody asked the run to stop."""


class RetentionRun:
    """Carries a policy out once.

    It can be killed at any moment: what it was at is in ``soma.archives``, and the next run goes on there. Only the
    role that owns the tables can do it.

    Args:
        who: goes into the audit, with every archive.
        force: remove also what readers have not passed; each is noted in the archive's row, and fails when it reads on.
        stopping: when it is set, the run ends after the step it is at.
    """

    def __init__(
        self, pool: Pool, policy: RetentionPolicy, storage: Storage | None, *, who: str, force: Force | None = None,
        settings: RetentionSettings | None = None, stopping: asyncio.Event | None = None,
    ) -> None:  # fmt: skip
        if policy.archives and storage is None:
            raise ConfigurationError(
                "The policy lets events leave the log, and no place for archives is named.",
                cure="name a folder, or s3://bucket/path: no event goes without an archive.",
            )
        self._pool, self._policy, self._force = pool, policy, force
        self._settings = settings or RetentionSettings()
        self._stopping = stopping or asyncio.Event()
        self.catalog = Catalog(pool, who=who, lease=self._settings.lease)
        self._storage = storage
        self._heart: asyncio.Task[None] | None = None
        self._report = Report()

    async def plan(self) -> RetentionPlan:
        """What it would do now; nothing is changed but for a new tick."""
        await self._settle()
        return await make_plan(self.catalog, self._policy)

    async def run(self) -> Report:
        """Do it.

        Raises:
            ConfigurationError: this role does not own the tables.
            RetentionError: another run is at it; or the archives' place is away, or not what was written there. The log
                holds everything that no verified archive holds.
        """
        await self.catalog.check_rights()
        self._report = Report()
        async with self._leased():
            with suppress(_Stopped):
                await self._maintain(*_MAINTENANCE)
                await self._settle()
                _, _, now = await self.catalog.about()
                sweeper = Sweeper(self._pool, self._policy, self._alive, self._settings.gently)
                await sweeper.sweep(now, self._report.swept)
                await self._finish(await plan_steps(self.catalog, self._policy, now))
        self._report.stopped = self._stopping.is_set()
        return self._report

    @asynccontextmanager
    async def _leased(self) -> AsyncIterator[None]:
        await self.catalog.claim()
        self._heart = asyncio.create_task(self._beat(), name="retention lease")
        try:
            yield
        finally:
            self._heart.cancel()
            with suppress(asyncio.CancelledError, SomaError):
                await self._heart
            with suppress(InfrastructureError):  # it expires by itself
                await self.catalog.release()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease / 3)
            with suppress(InfrastructureError):
                await self.catalog.renew()

    async def _alive(self) -> None:
        """Between two steps: stop when asked to, or when the lease was lost."""
        if self._stopping.is_set():
            raise _Stopped
        if self._heart is not None and self._heart.done():
            self._heart.result()

    async def _maintain(self, *names: str) -> None:
        for name in names:
            with suppress(TransactionConflict):
                await self._pool.fetch(blocks("readers")[name])

    async def _settle(self) -> None:
        """Make a tick that shows all of every old partition, if the transactions that stand against it end in time."""
        end = asyncio.get_running_loop().time() + self._settings.patience
        while True:
            await self._alive()
            await self._pool.fetch(blocks("readers")["tick"], 0, 0)
            if all(partition.tick_id is not None for partition in await self.catalog.partitions()):
                return
            if asyncio.get_running_loop().time() > end:
                return
            await asyncio.sleep(_LOOK)

    async def _finish(self, steps: tuple[Step, ...]) -> None:
        """First what an earlier run began, then what the plan says."""
        if self._storage is None:
            return
        exporter = Exporter(self.catalog, self._storage, self._alive, file_bytes=self._settings.file_bytes)
        wanted = {step.partition.lower_position: step for step in steps}
        begun = set()
        for archive in await self.catalog.archives("unfinished"):
            begun.add(archive.lower_position)
            step = wanted.get(archive.lower_position)
            if archive.state is ArchiveState.REMOVING or (step and set(archive.event_types) <= set(step.expired)):
                await self._one(exporter, archive)
            else:
                await self.catalog.abandon(archive)  # the policy changed, and nothing has left the log yet
        for step in steps:
            if step.action is Action.KEEP or step.partition.lower_position in begun:
                continue
            if step.waits is not None and not (step.behind and self._force):
                self._report.waiting[step.partition.name] = step.waits
                continue
            await self._alive()
            archive = await self.catalog.open(
                step.partition,
                step.expired,
                whole=step.action is Action.DROP,
                location=await self._location(step.partition),
            )
            await exporter.export(archive)
            await self._one(exporter, archive)

    async def _one(self, exporter: Exporter, archive: Archive) -> None:
        """Bring one archive to its end, from wherever it is; read back in full before anything leaves the log."""
        archive = await self._verified(exporter, archive)
        waits = await Remover(self.catalog, self._alive, self._settings.gently).remove(archive, self._force)
        if waits is None:
            self._report.removed.append(archive)
        else:
            self._report.waiting[archive.location] = waits

    async def _verified(self, exporter: Exporter, archive: Archive) -> Archive:
        """An archive that was just read back. While nothing of it has left the log, a bad one is written anew."""
        await self._alive()
        try:
            manifest, digest = await exporter.verify(archive)
        except (ArchiveCorrupt, ArchiveUnavailable) as error:
            if archive.state is ArchiveState.REMOVING:
                raise
            log.info("Archive %s is written anew: %s", archive.location, error)
            # First the row, under the lease: a run that was overtaken would take a good archive's manifest away.
            await self.catalog.relocate(archive, await self._location(archive))
            await exporter.withdraw(archive)
            archive = await self._again(archive)
            await exporter.export(archive)
            manifest, digest = await exporter.verify(archive)
        if archive.state is ArchiveState.EXPORTING:
            await self.catalog.verified(archive, manifest, digest)
        return await self._again(archive)

    async def _again(self, archive: Archive) -> Archive:
        return next(a for a in await self.catalog.archives("unfinished") if a.archive_id == archive.archive_id)

    async def _location(self, of: Partition | Archive) -> str:
        """A folder that no other try has."""
        log_id, _, _ = await self.catalog.about()
        return f"{log_id}/events-{of.lower_position:019d}-{uuid4().hex[:12]}"


class Retention(Service):
    """Carries the policy out every so often, until it is asked to stop; then it stops after the step it is at.

    ``last`` is the report of the last run, ``failed`` the error that ended it, if one did. A run that fails is tried
    again after ``settings.every``.
    """

    def __init__(
        self, pool: Pool, policy: RetentionPolicy, storage: Storage | None, *, who: str,
        settings: RetentionSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__("retention")
        self._arguments = (pool, policy, storage)
        self._who, self._settings = who, settings or RetentionSettings()
        self.last: Report | None = None
        self.failed: SomaError | None = None

    async def run(self) -> None:
        """Run after run. Raises ConfigurationError: that does not mend itself."""
        while not self.stopping.is_set():
            run = RetentionRun(*self._arguments, who=self._who, settings=self._settings, stopping=self.stopping)
            try:
                self.last, self.failed = await run.run(), None
                log.info("Retention: %s archives, %s", len(self.last.removed), self.last.swept)
                for what, waits in self.last.waiting.items():
                    log.warning("Retention waits: %s: %s", what, waits)
            except ConfigurationError:
                raise
            except SomaError as error:
                self.failed = error
                log.error("Retention failed, and will be tried again: %s", error)
            await self.pause(self._settings.every)
