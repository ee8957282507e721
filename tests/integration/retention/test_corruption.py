"""What was changed in an archive is found out, before anything of it is used and before anything leaves the log."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import ArchiveCorrupt, ArchiveUnavailable, LeaseLost, RetentionError
from soma_common.retention.catalog import Catalog
from soma_common.retention.exporting import Exporter
from soma_common.retention.format import decode, encode
from soma_common.retention.manifest import Manifest
from soma_common.retention.reader import ArchiveReader
from soma_common.retention.storage import FolderStorage
from tests.integration.retention.conftest import EVERYTHING


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


async def test_every_changed_byte_of_a_file_is_found(retained: Any) -> None:
    await retained.fill(200)
    await retained.retain()
    part = files(retained.folder, "part-*.avro")[0]
    good = part.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 25)):
        part.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ArchiveCorrupt, match="part-00000"):
            await retained.archived()
    for bad in (b"", good[:-1], good + b"x", b"\0" * len(good)):
        part.write_bytes(bad)
        with pytest.raises(ArchiveCorrupt):
            await retained.archived()
    part.unlink()
    with pytest.raises(ArchiveUnavailable, match="cannot be read"):
        await retained.archived()
    part.write_bytes(good)
    assert len(await retained.archived()) == 199


async def test_a_changed_manifest_is_found(retained: Any) -> None:
    await retained.fill(200)
    await retained.retain()
    manifest = files(retained.folder, "manifest.json")[0]
    good = manifest.read_bytes()
    given = json.loads(good)
    changes: list[Any] = [
        given | {"made_by": "mallory"}, given | {"whole": False}, given | {"counts": {}}, given | {"files": []},
        given | {"format": 2}, {k: v for k, v in given.items() if k != "digest"}, [], "x", None,
    ]  # fmt: skip
    for changed in (*(json.dumps(each).encode() for each in changes), b"", b"{", b"\xff\xfe", b"[" * 5000, good[:-20]):
        manifest.write_bytes(changed)
        with pytest.raises(ArchiveCorrupt):
            await retained.archived()
    manifest.write_bytes(good)
    assert len(await retained.archived()) == 199


async def test_a_forged_manifest_is_not_the_databases(retained: Any) -> None:
    """Somebody who writes a new digest too is found by the checksum in the database."""
    await retained.fill(200)
    (archive, *_) = (await retained.retain()).removed
    path = next(path for path in files(retained.folder, "manifest.json") if archive.location in str(path))
    manifest = Manifest.from_bytes(path.read_bytes())
    forged = Manifest(
        **{name: getattr(manifest, name) for name in Manifest.__dataclass_fields__} | {"made_by": "mallory"}
    )
    path.write_bytes(forged.to_bytes())
    exporter = Exporter(Catalog(retained.pool, who="t"), retained.storage, nothing)
    with pytest.raises(ArchiveCorrupt, match="not the one that was written"):
        await exporter.verify(archive)


async def nothing() -> None:
    """Nobody stops this."""


async def test_names_in_a_manifest_cannot_lead_elsewhere(retained: Any, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    (tmp_path.parent / "secret").write_text("x")
    for name in ("../secret", "/etc/passwd", "a/../../secret", "", "a//b", "a\\b", "a/\0", "."):
        with pytest.raises(ArchiveUnavailable, match="no name"):
            storage.read(name)
    await retained.fill(200)
    await retained.retain()
    path = files(retained.folder, "manifest.json")[0]
    manifest = Manifest.from_bytes(path.read_bytes())
    given = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
    for name in ("../../secret", "..", "a/b"):
        renamed = [
            type(file)(**{n: getattr(file, n) for n in type(file).__dataclass_fields__} | {"name": name})
            for file in manifest.files
        ]
        path.write_bytes(Manifest(**given | {"files": tuple(renamed)}).to_bytes())
        with pytest.raises(RetentionError):
            await retained.archived()


async def test_an_archive_that_is_bad_before_anything_left_is_written_anew(retained: Any) -> None:
    events = await retained.fill(300)
    run = retained.run()
    real = run.catalog.begin

    async def refuse(*_: Any) -> tuple[str, ...]:
        return ("somebody",)

    run.catalog.begin = refuse
    report = await run.run()
    assert report.removed == []
    assert len(await retained.log()) == 300
    assert real is not None
    for part in files(retained.folder, "part-*.avro"):
        part.write_bytes(b"rotten")
    left = True
    while left:  # a transaction in another database of the server may hold a partition for a while
        left = bool((await retained.retain()).waiting)
    assert {archive.state for archive in await retained.archives()} == {"removed"}
    assert len(await retained.archives()) >= 2
    await retained.whole(events)


class Falling(FolderStorage):
    """A storage whose first read waits for a word, and fails then, as a connection that slept too long."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.go_on = threading.Event(), threading.Event()

    def read(self, name: str) -> bytes:
        if not self.go_on.is_set():
            self.asked.set()
            assert self.go_on.wait(60)
            raise ArchiveUnavailable(f"{name} cannot be read: it took too long.")
        return super().read(name)


async def test_a_run_that_was_overtaken_takes_no_manifest_away(retained: Any) -> None:
    """It slept while it read its archive back; another run found that archive whole, and dropped the partition."""
    events = await retained.fill(300)
    storage = Falling(retained.folder)
    slow = asyncio.create_task(retained.retain(storage=storage))
    assert await asyncio.to_thread(storage.asked.wait, 60)
    await retained.pool.fetch("UPDATE soma.retention_lease SET leased_until = '-infinity'")
    await retained.retain()
    storage.go_on.set()
    with pytest.raises(LeaseLost):
        await slow
    await retained.whole(events)


class Keeping(FolderStorage):
    """A storage from which nothing may be deleted, as a bucket for which the key has no such right."""

    def remove(self, name: str) -> None:
        raise ArchiveUnavailable(f"{name} cannot be removed: 403 AccessDenied.")


async def test_the_right_to_delete_is_not_needed(retained: Any) -> None:
    """A run that died in an export left a row without an archive: it is written elsewhere, and nothing is deleted."""
    events = await retained.fill(300)
    run = retained.run()
    await run._settle()
    await run.catalog.claim()
    (step, *_) = (await run.plan()).steps
    await run.catalog.open(step.partition, step.expired, whole=True, location=await run._location(step.partition))
    await run.catalog.release()
    report = await retained.retain(storage=Keeping(retained.folder))
    assert step.partition.lower_position in {archive.lower_position for archive in report.removed}
    await retained.whole(events)


async def test_an_archive_that_is_bad_when_part_of_it_has_left_stops_everything(retained: Any) -> None:
    from soma_common.retention.policy import RetentionPolicy
    from tests.integration.retention.conftest import MONTH

    await retained.fill(300, types=("order.paid", "telemetry.seen"))
    policy = RetentionPolicy(events={"telemetry.seen": MONTH})
    run = retained.run(policy)
    real, calls = run.catalog.thin, 0

    async def thin(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            run._stopping.set()
        return await real(*given)

    run.catalog.thin = thin
    assert (await run.run()).stopped
    left = len(await retained.log())
    part = files(retained.folder, "part-*.avro")[0]
    good = part.read_bytes()
    part.write_bytes(good[:-3])
    for _ in range(2):
        with pytest.raises(ArchiveCorrupt):
            await retained.retain(policy)
        assert len(await retained.log()) == left
    part.write_bytes(good)
    assert len((await retained.retain(policy)).removed) >= 2


async def test_folders_that_cannot_be_used(retained: Any, tmp_path: Path) -> None:
    events = await retained.fill(200)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArchiveUnavailable):
        await retained.retain(storage=FolderStorage(file))
    with pytest.raises(ArchiveUnavailable, match="no folder"):
        await ArchiveReader(FolderStorage(tmp_path / "nowhere")).archives()
    with pytest.raises(ArchiveUnavailable):
        await retained.retain(storage=FolderStorage(Path("/proc/self/archives")))  # root may write anywhere else
    assert await retained.log() == events


async def test_archives_of_two_logs_are_told_apart(retained: Any) -> None:
    await retained.fill(200)
    await retained.retain()
    await retained.pool.fetch("UPDATE soma.log_start SET log_id = gen_random_uuid()")
    await retained.pool.fetch("SELECT setval('soma.event_position', 10000150)")
    await retained.publish(100)
    await retained.pool.fetch("SELECT setval('soma.event_position', 20000150)")
    await retained.publish(1)
    assert (await retained.retain()).removed
    with pytest.raises(RetentionError, match="2 logs"):
        await ArchiveReader(retained.storage).query(EVERYTHING)
    log_id = (await retained.pool.fetch("SELECT log_id FROM soma.log_start"))[0][0]
    assert len(await ArchiveReader(retained.storage, log_id=log_id).query(EVERYTHING)) == 100
    assert len(await ArchiveReader(FolderStorage(retained.folder / str(log_id))).query(EVERYTHING)) == 100


async def test_the_same_rows_give_the_same_bytes(retained: Any) -> None:
    await retained.fill(60)
    rows = await Catalog(retained.pool, who="t").page(0, 10**9, None, 100)
    first, again = encode("part-00000.avro", rows), encode("part-00000.avro", rows)
    assert first == again
    assert [tuple(row) for row in decode(first.file, first.data)] == [tuple(row) for row in rows]
    assert os.path.basename(first.file.name) == first.file.name
