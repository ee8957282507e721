"""Writes an archive file by file, its manifest last, and reads all of it back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.metadata import version as version_of
from typing import Final

from soma_common.errors import ArchiveCorrupt, ArchiveUnavailable
from soma_common.events.rows import size_of
from soma_common.postgres.pool import Row
from soma_common.retention.catalog import Archive, Catalog
from soma_common.retention.format import decode, encode, event_type_of
from soma_common.retention.manifest import NAME, ArchivedFile, Manifest
from soma_common.retention.storage import Storage

log = logging.getLogger(__name__)

_PAGE_BYTES: Final = 8 * 2**20
_LARGEST_PAGE: Final = 5000

Alive = Callable[[], Awaitable[None]]


class Exporter:
    """Exports archives of one database into one storage.

    Nothing is ever written over: each try has a folder of its own, so that a process that was thought dead can spoil
    nothing. A folder without a manifest is no archive.

    Args:
        file_bytes: after about so many bytes, before compression, a new file is begun. Two such are held in memory.
        alive: awaited between two steps; raises what ends the export.
    """

    def __init__(self, catalog: Catalog, storage: Storage, alive: Alive, *, file_bytes: int = 32 * 2**20) -> None:
        self._catalog, self._storage, self._alive, self._file_bytes = catalog, storage, alive, file_bytes

    async def export(self, archive: Archive) -> tuple[Manifest, str]:
        """Write all files, then the manifest; it and its SHA-256.

        Raises:
            ArchiveUnavailable: the storage is away or full. The log is as it was.
            ArchiveCorrupt: the database has other events than were written.
        """
        files: list[ArchivedFile] = []
        try:
            counts = await self._write_all(archive, files)
        except BaseException:
            await self._take_back(archive, files)
            raise
        return await self._write_manifest(archive, files, counts)

    async def _write_all(self, archive: Archive, files: list[ArchivedFile]) -> Counter[str]:
        """Every file but the manifest, noted in ``files``; how many events there are of each type."""
        types = None if archive.whole else list(archive.event_types)
        counts: Counter[str] = Counter()
        rows: list[Row] = []
        size, after, end = 0, archive.lower_position - 1, archive.upper_position
        while (last := await self._catalog.reach(after, end, types, _LARGEST_PAGE, _PAGE_BYTES)) is not None:
            await self._alive()
            page = await self._catalog.page(after, last + 1, types, _LARGEST_PAGE)
            size += size_of(page)
            after = last
            rows += page
            counts.update(map(event_type_of, page))
            if size >= self._file_bytes:
                files.append(await self._write(archive, len(files), rows))
                rows, size = [], 0
        if rows:
            files.append(await self._write(archive, len(files), rows))
        await self._check_count(archive, types, counts)
        return counts

    async def _take_back(self, archive: Archive, files: list[ArchivedFile]) -> None:
        """Free the space of a try that failed in this process. What a killed one left stays: it may be alive yet, and
        would find its own files gone under its manifest."""
        with suppress(ArchiveUnavailable):
            for file in files:
                await asyncio.to_thread(self._storage.remove, f"{archive.location}/{file.name}")

    async def withdraw(self, archive: Archive) -> None:
        """Take a bad archive's manifest away, so that no reader meets what is written anew elsewhere.

        Whoever may not delete there goes on: the database no longer names that place.
        """
        try:
            await asyncio.to_thread(self._storage.remove, f"{archive.location}/{NAME}")
        except ArchiveUnavailable as error:
            log.warning("Move %s away, readers may meet it and fail: %s", archive.location, error)

    async def _write(self, archive: Archive, number: int, rows: list[Row]) -> ArchivedFile:
        encoded = await asyncio.to_thread(encode, f"part-{number:05d}.avro", rows)
        await asyncio.to_thread(self._storage.write, f"{archive.location}/{encoded.file.name}", encoded.data)
        return encoded.file

    async def _check_count(self, archive: Archive, types: list[str] | None, counts: Counter[str]) -> None:
        """Also tells a run that was taken over: what it read may be gone already."""
        await self._alive()
        there = await self._catalog.count(archive.lower_position, archive.upper_position, types)
        if there != counts.total() or set(counts) != set(archive.event_types):
            raise ArchiveCorrupt(
                f"{counts.total()} events of {sorted(counts)} were written, and the log has {there} of "
                f"{sorted(archive.event_types)} at positions {archive.lower_position} to {archive.upper_position - 1}.",
                cure="run it again; if it says the same, somebody changes events by hand.",
            )

    async def _write_manifest(
        self, archive: Archive, files: list[ArchivedFile], counts: Counter[str]
    ) -> tuple[Manifest, str]:  # fmt: skip
        log_id, version, now = await self._catalog.about()
        manifest = Manifest(
            archive_id=archive.archive_id,
            log_id=log_id,
            lower_position=archive.lower_position,
            upper_position=archive.upper_position,
            whole=archive.whole,
            counts=dict(sorted(counts.items())),
            files=tuple(files),
            tick_id=archive.tick_id,
            library=version_of("soma-common"),
            schema_version=version,
            made_by=self._catalog.who,
            made_at=now,
        )
        data = manifest.to_bytes()
        await asyncio.to_thread(self._storage.write, f"{archive.location}/{NAME}", data)
        return manifest, hashlib.sha256(data).hexdigest()

    async def verify(self, archive: Archive) -> tuple[Manifest, str]:
        """Read an archive back, every event of it; its manifest and that one's SHA-256.

        Raises:
            ArchiveUnavailable: a part of it is not there.
            ArchiveCorrupt: it is not what its manifest, or the database, says.
        """
        manifest, digest = await read_manifest(self._storage, archive.location)
        if (
            manifest.archive_id != archive.archive_id
            or set(manifest.counts) != set(archive.event_types)
            or manifest.whole != archive.whole
            or (archive.manifest_sha256 is not None and archive.manifest_sha256 != digest)
        ):
            raise ArchiveCorrupt(
                f"The manifest in {archive.location} is not the one that was written there.",
                cure="take the archive from a copy.",
            )
        counts: Counter[str] = Counter()
        for file in manifest.files:
            await self._alive()
            counts.update(map(event_type_of, await read_file(self._storage, archive.location, file)))
        if dict(counts) != dict(manifest.counts):
            raise ArchiveCorrupt(f"{archive.location} does not hold the events that its manifest says.")
        return manifest, digest


async def read_manifest(storage: Storage, location: str) -> tuple[Manifest, str]:
    """The manifest of a place, and its SHA-256.

    Raises:
        ArchiveUnavailable, ArchiveCorrupt: see :meth:`Exporter.verify`.
    """
    data = await asyncio.to_thread(storage.read, f"{location}/{NAME}")
    return Manifest.from_bytes(data), hashlib.sha256(data).hexdigest()


async def read_file(storage: Storage, location: str, file: ArchivedFile) -> list[Row]:
    """The rows of one file, checked.

    Raises:
        ArchiveUnavailable, ArchiveCorrupt: see :meth:`Exporter.verify`.
    """
    data = await asyncio.to_thread(storage.read, f"{location}/{file.name}")
    return await asyncio.to_thread(decode, file, data)
