"""Old partitions go into archives and out of the log; what is read back is what was there."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from soma_common.errors import AppendError, ConfigurationError, EventsArchived, RetentionError
from soma_common.events.models import Event
from soma_common.events.rows import SELECT
from soma_common.events.store import ALL_TENANTS, EventFilter
from soma_common.retention.catalog import ArchiveState, Catalog, Force
from soma_common.retention.exporting import Exporter
from soma_common.retention.planning import Action
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.reader import ArchiveReader
from soma_common.retention.removing import Gently
from soma_common.retention.running import RetentionRun, RetentionSettings
from soma_common.sql.loader import blocks
from tests.core_support import Reader, connected, waiting_for_lock
from tests.integration.retention.conftest import QUICK
from tests.waiting import until

MONTH = timedelta(days=30)


async def test_nothing_goes_unless_somebody_says_so(retained: Any) -> None:
    events = await retained.fill()
    report = await retained.retain(RetentionPolicy())
    assert (report.removed, report.swept) == ([], {})
    assert await retained.log() == events
    assert await retained.archives() == []
    report = await retained.retain(RetentionPolicy(default=timedelta(days=61)))
    assert report.removed == []
    assert await retained.log() == events
    assert list(retained.folder.iterdir()) == []


async def test_old_partitions_are_archived_and_dropped(retained: Any) -> None:
    events = await retained.fill(types=("order.paid", "order.shipped"))
    before = await retained.parts()
    plan = await retained.run().plan()
    assert [step.action for step in plan.steps] == [Action.DROP] * 5
    report = await retained.retain()
    assert len(report.removed) == 5
    left = await retained.parts()
    assert sorted(set(before) - set(left)) == ["events_p0", *(f"events_p5000{n}00" for n in range(4))]
    assert sum(left.values()) == len(await retained.log()) < 100
    await retained.whole(events)
    for archive in await retained.archives():
        assert archive.state is ArchiveState.REMOVED
        assert (archive.made_by, archive.whole, archive.forced_by) == ("tests", True, None)
        assert archive.event_types == ("order.paid", "order.shipped")
        assert archive.removed_at >= archive.verified_at >= archive.started_at
    assert (await retained.retain()).removed == []  # nothing more to do


async def test_types_with_a_shorter_time_go_earlier(retained: Any) -> None:
    events = await retained.fill(types=("order.paid", "telemetry.seen", "telemetry.lost"))
    policy = RetentionPolicy(events={"telemetry.*": MONTH})
    plan = await retained.run(policy).plan()
    assert {(step.action, step.expired, step.kept) for step in plan.steps} == {
        (Action.THIN, ("telemetry.lost", "telemetry.seen"), ("order.paid",))
    }
    report = await retained.retain(policy)
    assert len(report.removed) == 5
    await retained.whole(events)
    log, archived = await retained.log(), await retained.archived()
    end = report.removed[-1].upper_position
    assert {event.event_type for event in log if event.position < end} == {"order.paid"}
    assert {event.event_type for event in archived} == {"telemetry.seen", "telemetry.lost"}
    assert (await retained.retain(policy)).removed == []
    # Later the rest goes too, and what is merged from two archives of a partition is in order.
    assert len((await retained.retain()).removed) == 5
    await retained.whole(events)
    archived = await retained.archived()
    assert [event.position for event in archived] == sorted(event.position for event in archived)
    assert len(archived) > 400


async def test_the_same_on_an_older_postgresql(retained16: Any) -> None:
    events = await retained16.fill(300, types=("order.paid", "telemetry.seen"))
    await retained16.retain(RetentionPolicy(events={"telemetry.*": MONTH}, inbox=MONTH))
    await retained16.whole(events)
    assert len(await retained16.pool.fetch("SELECT FROM soma.inbox_partitions()")) == 3
    with pytest.raises(EventsArchived):
        await Reader(retained16.store).page()
    assert len((await retained16.retain()).removed) == 3
    await retained16.whole(events)


async def test_the_log_refuses_to_lose_what_no_archive_holds(retained: Any) -> None:
    await retained.fill(types=("order.paid", "telemetry.seen"))
    await retained.retain(RetentionPolicy(events={"telemetry.seen": MONTH}))
    (archive, *_) = await retained.archives()
    async with connected(retained.dsn) as owner:
        for setting in ("", str(archive.archive_id), "x"):
            await owner.execute(f"SET soma.removing = '{setting}'")
            with pytest.raises(asyncpg.PostgresError, match="append-only"):
                await owner.execute("DELETE FROM soma.events")
            with pytest.raises(asyncpg.PostgresError, match="append-only"):
                await owner.execute("UPDATE soma.events SET version = 1")
            with pytest.raises(asyncpg.PostgresError, match="append-only"):
                await owner.execute("TRUNCATE soma.events")


async def test_queries_of_an_archive_answer_like_the_log(retained: Any) -> None:
    events = await retained.fill(types=("order.paid", "order.shipped"))
    events += await retained.publish(20, tenant_id="globex", start=500)
    some = events[130]
    filters = [
        {}, {"tenant_id": "acme"}, {"tenant_id": "globex"}, {"event_type": "order.shipped"}, {"event_type": "no.such"},
        {"event_id": some.event_id}, {"trace_id": some.trace_id}, {"correlation_id": some.correlation_id},
        {"aggregate_id": "a3"}, {"aggregate_type": "default"}, {"aggregate_type": "other"}, {"service_id": "tests"},
        {"since": some.timestamp}, {"until": some.timestamp}, {"since": events[50].timestamp, "until": some.timestamp},
    ]  # fmt: skip
    wanted = [EventFilter(**({"tenant_id": ALL_TENANTS} | given)) for given in filters]
    found = [[await pages(retained.store, each, newest) for newest in (False, True)] for each in wanted]
    last = (await retained.retain()).removed[-1].upper_position
    reader = ArchiveReader(retained.storage)
    for each, (oldest, newest) in zip(wanted, found, strict=True):
        assert await pages(reader, each, False) == [event for event in oldest if event.position < last], each
        assert await pages(reader, each, True) == [event for event in newest if event.position < last], each
    assert len(found[0][0]) == 520


async def pages(source: Any, wanted: EventFilter, newest_first: bool) -> list[Any]:
    """Every event of a filter, by pages of 37."""
    after, found = None, []
    while True:
        page = await source.query(wanted, limit=37, after=after, newest_first=newest_first)
        found += page.events
        if page.next_after is None:
            return found
        after = page.next_after


async def test_an_empty_partition_and_the_open_one_stay(retained: Any) -> None:
    await retained.partitions(100)
    await retained.pool.fetch("SELECT setval('soma.event_position', 5000250)")
    await retained.pool.fetch("SELECT soma.maintain_events(100)")
    await retained.publish(3)
    assert (await retained.retain()).removed == []
    assert (await retained.run().plan()).steps[0].action is Action.KEEP


async def test_a_stream_with_archived_events_is_not_read_as_if_it_were_whole(retained: Any) -> None:
    events = await retained.fill(types=("order.paid", "telemetry.seen"))
    stream = events[0].stream
    assert len([e async for e in retained.store.read(stream)]) == 50
    await retained.retain(RetentionPolicy(events={"telemetry.seen": MONTH}))
    other = next(e.stream for e in events if e.event_type == "telemetry.seen")
    with pytest.raises(EventsArchived, match=r"Versions 1 to \d+ of stream .* are no longer in the log"):
        _ = [e async for e in retained.store.read(other)]
    await retained.retain()
    with pytest.raises(EventsArchived) as raised:
        _ = [e async for e in retained.store.read(stream)]
    left = [e async for e in retained.store.read(stream, from_version=int(raised.value.message.split()[3]) + 1)]
    assert [e.version for e in left] == list(range(50 - len(left) + 1, 51))
    assert (await retained.store.publish(event(stream), expected_version=50))[0].version == 51
    with pytest.raises(EventsArchived):  # the end of a stream may be what is gone
        _ = [e async for e in retained.store.read(other, from_version=3)]


def event(stream: Any) -> Event:
    return Event(
        payload={"n": 1}, event_type="order.paid", tenant_id=stream.tenant_id, aggregate_id=stream.aggregate_id
    )


async def test_a_key_whose_event_is_archived_is_still_known(retained: Any) -> None:
    await retained.partitions()
    given = {"payload": {"n": 1}, "tenant_id": "acme", "event_type": "order.paid", "aggregate_id": "a1"}
    await retained.store.publish(Event(**given, idempotency_key="k"))
    await retained.publish(200)
    assert len((await retained.retain()).removed) >= 1
    with pytest.raises(AppendError, match="no longer in the log"):
        await retained.store.publish(Event(**given, idempotency_key="k"))
    assert len(await retained.log()) < 200
    # Past the time of the keys it is a new event.
    report = await retained.retain(RetentionPolicy(idempotency_keys=MONTH))
    assert report.swept == {"idempotency_keys": 1}
    assert (await retained.store.publish(Event(**given, idempotency_key="k")))[0].version > 1


async def test_registered_readers_hold_the_log(retained: Any) -> None:
    await retained.fill()
    worker = retained.log_worker()
    async with worker:
        await retained.applied(300)
    await retained.publish(1)
    (await retained.store.ticks.latest())
    report = await retained.retain()
    assert report.removed == []
    assert set(report.waiting.values()) == {"not passed by consumer:billing"}
    worker = retained.log_worker()
    async with worker:
        await retained.applied(501)
        await retained.passed()
    assert len((await retained.retain()).removed) == 5
    assert await retained.count() == 501


async def test_a_forced_run_is_audited_and_the_overtaken_reader_fails_clearly(retained: Any) -> None:
    events = await retained.fill()
    worker = retained.log_worker()
    async with worker:
        await retained.applied(100)
    done = await retained.count()
    report = await retained.retain(force=Force("ann", "the disk is full"))
    assert len(report.removed) == 5
    for archive in await retained.archives():
        assert (archive.forced_by, archive.forced_why) == ("ann", "the disk is full")
        assert archive.overtaken == ("consumer:billing",)
    overtaken = retained.log_worker()
    await overtaken.start()
    with pytest.raises(EventsArchived, match="consumer:billing stands at tick") as raised:
        async with asyncio.timeout(60):
            await overtaken.wait()
    assert "somastack retention accept" in (raised.value.cure or "")
    with pytest.raises(EventsArchived):
        await overtaken.stop()
    retained.workers.remove(overtaken)
    assert await retained.count() == done  # nothing behind the gap was applied
    catalog = retained.run().catalog
    await catalog.accept("consumer:billing", by="ann", why="billing is rebuilt anyway")
    worker = retained.log_worker()
    left = {event.event_id for event in await retained.log()}

    async def there() -> bool:
        return {row[0] for row in await retained.effects()} >= left

    async with worker:
        await until(there, what="what is left of the log")
    assert 0 < len(left) < len(events)
    assert len(await retained.effects()) == len({row[0] for row in await retained.effects()})


async def test_unregistered_and_new_readers_do_not_miss_what_went_in_silence(retained: Any) -> None:
    await retained.fill(types=("order.paid", "telemetry.seen"))
    kept = Reader(retained.store)

    async def has_passed() -> bool:  # a transaction in another database of the server may stand against a tick
        await kept.drain()
        old = await Catalog(retained.later, who="tests").partitions()
        return all(part.tick_id is not None and part.tick_id <= kept.cursor.from_tick for part in old)

    await until(has_passed)
    middle = Reader(retained.store)
    await middle.page(100)
    await retained.publish(10)
    await retained.retain(RetentionPolicy(events={"telemetry.seen": MONTH}))
    assert len(await kept.drain()) == 10
    for reader in (middle, Reader(retained.store)):
        with pytest.raises(EventsArchived, match="the log is whole from tick"):
            await reader.page()
    with pytest.raises(EventsArchived):
        async for _ in retained.store.subscribe():
            raise AssertionError("an event came")
    await retained.run().catalog.accept("reports", by="ann", why="orders are enough")
    async for event, _ in retained.store.subscribe(reader="reports"):
        assert event.event_type == "order.paid"
        break


async def test_a_reader_that_waits_for_the_drop_is_told(retained: Any) -> None:
    """The statement was sent before the drop committed, and is carried out after it."""
    await retained.fill()
    run = retained.run()
    await run._settle()
    async with connected(retained.dsn) as blocker, connected(retained.dsn) as slow:
        reader = Reader(retained.store)
        diff = await retained.store.ticks.next_diff(reader.cursor, await retained.store.ticks.latest())
        assert len(await retained.store.log_page(diff, 1000)) == 500
        await run.catalog.claim()
        (step, *_) = (await run.plan()).steps
        exporter, archive = await exported(run, step)
        manifest, digest = await exporter.verify(archive)
        await run.catalog.verified(archive, manifest, digest)
        assert await run.catalog.begin(archive, None) == ()
        transaction = blocker.transaction()
        await transaction.start()
        assert (
            await blocker.fetchval("SELECT soma.drop_archived($1, $2)", run.catalog.owner, archive.archive_id)
            == "dropped"
        )
        pid = await slow.fetchval("SELECT pg_backend_pid()")
        page = asyncio.create_task(fetch_page(slow, diff))
        async with connected(retained.dsn) as watcher:
            await waiting_for_lock(watcher, pid)
        await transaction.commit()
        with pytest.raises(asyncpg.PostgresError, match="went into archives"):
            await page


async def fetch_page(connection: Any, diff: Any) -> Any:
    args = (diff.low, diff.target.position_after, diff.base.xmax, diff.target.snapshot, 1000, None, diff.base.tick_id)
    return await connection.fetch(SELECT + blocks("store")["log_page"], *args)


async def exported(run: Any, step: Any) -> Any:
    exporter = Exporter(run.catalog, run._storage, run._alive, file_bytes=20_000)
    whole = step.action is Action.DROP
    archive = await run.catalog.open(
        step.partition, step.expired, whole=whole, location=await run._location(step.partition)
    )
    await exporter.export(archive)
    return exporter, archive


async def test_a_transaction_that_still_runs_holds_its_partition(retained: Any) -> None:
    await retained.partitions()
    async with connected(retained.dsn) as slow:
        transaction = slow.transaction()
        await transaction.start()
        await retained.store.publish(
            Event(payload={"n": 0}, event_type="late.event", tenant_id="t", aggregate_id="z"), tx=slow
        )
        for start in range(0, 500, 100):
            await retained.publish(100, start=start)
            await retained.pool.fetch("SELECT soma.maintain_events(100)")
        report = await retained.retain(settings=RetentionSettings(gently=Gently(pause=0), patience=0.2))
        assert "still runs" in report.waiting["events_p0"]
        assert await retained.archives() == []
        await transaction.commit()
    report = await retained.retain()
    assert len(report.removed) >= 1
    late = [event for event in await retained.archived() if event.event_type == "late.event"]
    assert len(late) == 1


async def test_two_runs_at_once_do_not_meet(retained: Any) -> None:
    events = await retained.fill()
    results = await asyncio.gather(*(retained.retain() for _ in range(3)), return_exceptions=True)
    reports = [each for each in results if not isinstance(each, BaseException)]
    refused = [each for each in results if isinstance(each, BaseException)]
    assert len(reports) >= 1
    assert all(isinstance(each, RetentionError) and "is at it" in each.message for each in refused)
    assert sum(len(report.removed) for report in reports) == 5
    await retained.whole(events)


async def test_a_clock_that_is_set_back_does_not_lock_retention_out(retained: Any) -> None:
    """The lease of a run that died, and a mark of the inbox, are of a clock that was weeks ahead."""
    await Catalog(retained.later, who="dead", lease=30.0).claim()
    inbox = RetentionPolicy(inbox=MONTH)
    report = await RetentionRun(retained.pool, inbox, None, who="tests", settings=QUICK).run()
    assert not report.stopped
    await retained.pool.fetch("UPDATE soma.retention_marks SET made_at = made_at + interval '60 days'")
    await RetentionRun(retained.pool, inbox, None, who="tests", settings=QUICK).run()
    marks = await retained.pool.fetch("SELECT count(*) FILTER (WHERE made_at <= soma.now()) FROM soma.retention_marks")
    assert marks[0][0] == 1
    await Catalog(retained.pool, who="alive").claim()
    with pytest.raises(RetentionError, match="alive is at it, and holds its lease until 20"):
        await Catalog(retained.pool, who="other").claim()


async def test_bad_arguments(retained: Any) -> None:
    with pytest.raises(ConfigurationError, match="no place for archives"):
        retained.run(storage=None)
    for by, why in (("", "x"), ("ann", " "), ("ann", "a\nb"), ("ann", "x" * 1001), ("\0", "x")):
        with pytest.raises(Exception, match="is '"):
            Force(by, why)
