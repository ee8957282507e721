"""Retention beside live traffic: writers, a consumer, a replay and queries go on, and nothing is lost or late."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from soma_common.consumer.handlers import EVERY_TYPE, Handlers
from soma_common.errors import EventsArchived, ReplayRefused
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import ReplayFilter
from soma_common.retention.catalog import Force
from soma_common.retention.format import decode, encode
from soma_common.retention.manifest import Manifest
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.reader import ArchiveReader
from soma_common.retention.removing import Gently
from soma_common.retention.running import Retention, RetentionSettings
from tests.integration.consumer.conftest import apply
from tests.integration.retention.conftest import QUICK
from tests.waiting import until

MONTH = timedelta(days=30)
EVERYTHING = ReplayFilter(tenant_id=ALL_TENANTS)


async def test_writers_a_consumer_and_a_reader_beside_a_service(retained: Any) -> None:
    """The service thins and drops while events are written and applied; each effect is there once, in order."""
    await retained.partitions(100, ahead=60)
    events: list[Any] = []
    done = asyncio.Event()

    async def write(number: int) -> None:
        n = 0
        while not done.is_set() and n < 900:
            for kind in ("order.paid", "telemetry.seen"):
                events.extend(await retained.publish(5, start=n, keys=3, tenant_id=f"w{number}", event_type=kind))
            n += 5

    async def query() -> float:
        slowest = 0.0
        while not done.is_set():
            start = time.monotonic()
            await retained.store.query(tenant_id="w0", limit=10, newest_first=True)
            slowest = max(slowest, time.monotonic() - start)
            await asyncio.sleep(0.01)
        return slowest

    policy = RetentionPolicy(default=MONTH * 1.5, events={"telemetry.*": MONTH})
    settings = RetentionSettings(gently=Gently(batch=20, pause=0.0), every=0.2, patience=0.5)
    service = Retention(retained.later, policy, retained.storage, who="service", settings=settings)
    async with retained.log_worker(), service:
        writers = [asyncio.create_task(write(n)) for n in range(3)]
        looking = asyncio.create_task(query())

        async def enough() -> bool:
            assert service.failed is None
            found = await retained.pool.fetch("SELECT count(*) FROM soma.archives WHERE state = 'removed'")
            return bool(found[0][0] >= 6)

        try:
            await until(enough, within=150, what="six archives")
        finally:
            done.set()
            await asyncio.gather(*writers)
        assert await looking < 30
        await retained.applied(len(events), within=120)
    await retained.check(events)
    await retained.whole(events)


async def test_an_open_replay_holds_the_log_and_a_forced_run_fails_it(retained: Any) -> None:
    await retained.fill(400)
    async with retained.log_worker():
        await retained.applied(400)
        await retained.passed()
    engine = replaying(retained)
    async with engine:
        run = await engine.start(EVERYTHING, "force", requested_by="ann", reason="again")
        report = await retained.retain()
        assert report.removed == []
        assert set(report.waiting.values()) == {f"not passed by replay:{run.run_id}"}
        report = await retained.retain(force=Force("ann", "no space"))
        assert len(report.removed) == 4
        with pytest.raises(ReplayRefused, match="went into archives"):
            async for _ in engine.run(run.run_id):
                raise AssertionError("a batch was applied")
        assert (await engine.progress(run.run_id)).state == "failed"
        assert await retained.count() == 400
        # A new one is told before it begins; behind the gap, or of types that are whole, it works.
        with pytest.raises(ReplayRefused, match="went into archives"):
            await engine.start(EVERYTHING)
        first = (await retained.log())[0]
        for wanted in (ReplayFilter(tenant_id=ALL_TENANTS, since=first.timestamp),
                       ReplayFilter(tenant_id=ALL_TENANTS, event_type="no.such")):  # fmt: skip
            assert (await engine.plan(wanted)).total in (0, len(await retained.log()))


async def test_a_replay_reads_what_was_removed_from_the_archives(retained: Any) -> None:
    events = await retained.fill(400, types=("order.paid", "telemetry.seen"))
    async with retained.log_worker():
        await retained.applied(400)
        await retained.passed()
    await retained.retain(RetentionPolicy(events={"telemetry.*": MONTH}))
    await retained.retain(RetentionPolicy(default=MONTH * 1.9, events={"telemetry.*": MONTH}))
    assert len(await retained.log()) < 300
    await retained.pool.fetch("TRUNCATE effect")
    async with replaying(retained, archive=ArchiveReader(retained.storage)) as engine:
        run = await engine.start(EVERYTHING, "force", requested_by="ann", reason="again")
        last = await finish(engine, run)
        assert (last.state, last.counts.read, last.counts.applied) == ("done", 400, 400)
        await retained.check(events)
        run = await engine.start(EVERYTHING, "missing")
        assert (await finish(engine, run)).counts.repeated == 400
        since = ReplayFilter(tenant_id=ALL_TENANTS, since=events[90].timestamp, until=events[200].timestamp)
        run = await engine.start(since, "force", requested_by="ann", reason="again")
        wanted = [event for event in events if events[90].timestamp <= event.timestamp < events[200].timestamp]
        assert (await finish(engine, run)).counts.read == len(wanted)
    for path in sorted(retained.folder.rglob("manifest.json"))[:1]:
        path.unlink()
    async with replaying(retained, archive=ArchiveReader(retained.storage)) as engine:
        with pytest.raises(ReplayRefused, match="not among these archives"):
            run = await engine.start(EVERYTHING, "force", requested_by="ann", reason="again")
            await finish(engine, run)


async def test_a_replay_takes_from_a_place_only_what_the_database_vouches_for(retained: Any) -> None:
    events = await retained.fill(300)
    async with retained.log_worker():
        await retained.applied(300)
        await retained.passed()
    await retained.retain()
    path = sorted(retained.folder.rglob("manifest.json"))[0]
    good = Manifest.from_bytes(path.read_bytes())
    # Whole in itself, and of the same log: what a restore to an earlier moment leaves behind.
    rows = decode(good.files[0], path.with_name("part-00000.avro").read_bytes())
    forged = encode("part-00000.avro", [(*row[:2], uuid4(), *row[3:]) for row in rows])
    other = replace(good, archive_id=uuid4(), files=(forged.file, *good.files[1:]))
    folder = path.parent.with_name(f"events-{good.lower_position:019d}-0")
    shutil.copytree(path.parent, folder)
    (folder / "part-00000.avro").write_bytes(forged.data)
    (folder / "manifest.json").write_bytes(other.to_bytes())
    await retained.pool.fetch("TRUNCATE effect")
    async with replaying(retained, archive=ArchiveReader(retained.storage)) as engine:
        assert (await engine.plan(EVERYTHING)).total == 300
        run = await engine.start(EVERYTHING, "force", requested_by="ann", reason="again")
        assert (await finish(engine, run)).counts.read == 300
        await retained.check(events)
    # The same archive by its id, but not by the checksum in the database.
    path.write_bytes(replace(good, made_by="mallory").to_bytes())
    async with replaying(retained, archive=ArchiveReader(retained.storage)) as engine:
        with pytest.raises(ReplayRefused, match="not the one that was written"):
            await engine.plan(EVERYTHING)


async def test_a_plan_counts_what_is_being_removed_once(retained: Any) -> None:
    await retained.fill(300)
    async with retained.log_worker():
        await retained.applied(300)
        await retained.passed()
    reader = ArchiveReader(retained.storage)
    assert await reader.archives() == ()  # what was made since is looked up again
    async with retained.pool.transaction() as tx:
        await tx.fetch("SELECT count(*) FROM soma.events")  # the lock that a drop waits for
        report = await retained.retain(settings=replace(QUICK, gently=Gently(lock_tries=1)))
        assert report.removed == []
        assert {archive.state for archive in await retained.archives()} == {"removing"}
    assert len(await retained.log()) == 300
    async with replaying(retained, archive=reader) as engine:
        assert (await engine.plan(EVERYTHING)).total == 300
        assert len((await retained.retain()).removed) == 3
        assert (await engine.plan(EVERYTHING)).total == 300


async def test_large_events_behind_small_ones_are_read_a_few_at_a_time(retained: Any) -> None:
    """Thousands of them at once would not fit into memory."""
    await retained.partitions(500)
    await retained.publish(300)
    chance = random.Random(4)
    for n in range(40):
        payload = {"n": n, "x": chance.randbytes(300_000).hex() if n % 2 else "x" * 600_000}
        large = Event(payload=payload, event_type="order.paid", tenant_id="acme", aggregate_id=f"large{n}")
        await retained.store.publish(large)
    await retained.publish(300)
    await retained.pool.fetch("SELECT soma.maintain_events(500)")
    events = await retained.log()
    run = retained.run()
    real, sizes = run.catalog.page, []

    async def page(*given: Any) -> Any:
        rows = await real(*given)
        sizes.append(sum(len(row[5]) for row in rows))
        return rows

    run.catalog.page = page
    assert len((await run.run()).removed) == 2
    assert sum(sizes) > 20_000_000
    assert max(sizes) < 16_000_000
    await retained.whole(events)


async def test_an_overtaken_consumer_gets_what_it_missed_by_what_the_errors_say(retained: Any) -> None:
    events = await retained.fill(400)
    async with retained.log_worker():
        await retained.applied(100)
    assert len((await retained.retain(force=Force("ann", "no space"))).removed) == 4
    overtaken = retained.log_worker()
    await overtaken.start()
    with pytest.raises(EventsArchived) as stopped:
        async with asyncio.timeout(60):
            await overtaken.wait()
    with pytest.raises(EventsArchived):
        await overtaken.stop()
    retained.workers.remove(overtaken)
    assert "--archive" in str(stopped.value.cure)
    async with replaying(retained, archive=ArchiveReader(retained.storage)) as engine:
        with pytest.raises(ReplayRefused) as refused:
            await engine.start(EVERYTHING)
        assert "retention accept" in str(refused.value.cure)
        await retained.run().catalog.accept("consumer:billing", by="ann", why="the rest is replayed")
        async with retained.log_worker():

            async def has_passed() -> bool:
                await retained.pool.fetch("SELECT soma.tick('0')")
                left = {event.event_id for event in await retained.log()}
                try:
                    await engine.plan(EVERYTHING)
                except ReplayRefused:
                    return False
                return {row[0] for row in await retained.effects()} >= left

            await until(has_passed, what="the consumer behind the gap")
        run = await engine.start(EVERYTHING)
        assert (await finish(engine, run)).state == "done"
    found = [row[0] for row in await retained.effects()]
    assert len(found) == len(set(found)) == len(events)


async def finish(engine: Any, run: Any) -> Any:
    """Run to the end; the last progress."""
    return [run, *[progress async for progress in engine.run(run.run_id)]][-1]


def replaying(retained: Any, **given: Any) -> Any:
    handlers = Handlers()
    handlers.add(apply, EVERY_TYPE)
    settings = ReplaySettings(batch=50, page=120)
    return ReplayEngine(retained.pool.settings, "billing", handlers=handlers, settings=settings, **given)


async def test_a_service_stops_in_the_middle_and_goes_on(retained: Any) -> None:
    events = await retained.fill(400, types=("order.paid", "telemetry.seen"))
    policy = RetentionPolicy(events={"telemetry.*": MONTH})
    slow = RetentionSettings(gently=Gently(batch=1, pause=0.05), every=60.0)
    async with Pool(PoolSettings(retained.dsn, settings={"soma.clock_offset": "60 days"})) as later:
        service = Retention(later, policy, retained.storage, who="service", settings=slow)
        async with service:

            async def begun() -> bool:
                return len(await retained.log()) < 395

            await until(begun)
            start = time.monotonic()
            await service.stop()
            assert time.monotonic() - start < 20
        assert service.last is not None
        assert service.last.stopped
        assert 200 < len(await retained.log()) < 400
    await retained.whole(events)
    assert len((await retained.retain(policy)).removed) >= 3
    await retained.whole(events)
