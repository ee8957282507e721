"""Keys, the inbox, settled letters and replays that are over go in small steps; what may still be needed stays."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from soma_common.errors import ReplayRefused
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.engine import ReplayEngine
from soma_common.replay.models import ReplayFilter
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.running import RetentionRun
from tests.dlq_support import Desk, undelivered
from tests.integration.retention.conftest import QUICK
from tests.waiting import until

MONTH = timedelta(days=30)
INBOX = RetentionPolicy(inbox=MONTH)


def at(retained: Any, days: int) -> Pool:
    return Pool(PoolSettings(retained.dsn, settings={"soma.clock_offset": f"{days} days"}))


async def sweep(retained: Any, policy: RetentionPolicy, days: int, *, wait: bool = True) -> dict[str, int]:
    """A run that believes to live so many days from now. What was written before has ended, on the whole server."""
    written = (await retained.pool.fetch("SELECT pg_current_xact_id()::text"))[0][0]

    async def ended() -> bool:
        sql = "SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8"
        return bool((await retained.pool.fetch(sql, written))[0][0])

    if wait:
        await until(ended, what="the end of older transactions")
    async with at(retained, days) as pool:
        return (await RetentionRun(pool, policy, None, who="tests", settings=QUICK).run()).swept


async def inbox(retained: Any) -> dict[str, int]:
    rows = await retained.pool.fetch("SELECT tableoid::regclass::text, count(*) FROM soma.inbox GROUP BY 1")
    return {row[0]: row[1] for row in rows}


async def applied(retained: Any, *events: Event) -> list[Any]:
    """The events are recorded, and entered into the inbox of a consumer."""
    desk = await Desk.open(retained.pool)
    recorded = list(await retained.store.publish(events))
    claim = await desk.claim(*(replace(undelivered(), event=each) for each in recorded))
    assert all(claim.fresh)
    return recorded


def one(n: int = 0, *, made: datetime | None = None, **fields: Any) -> Event:
    given = {"payload": {"n": n}, "event_type": "order.paid", "tenant_id": "acme", "aggregate_id": f"a{n}"} | fields
    if made is not None:
        given["event_id"] = id_at(made, n)
    return Event(**given)


def id_at(made: datetime, n: int = 0) -> UUID:
    """A UUIDv7 of a moment."""
    return UUID(int=int(made.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | n)


async def test_keys_go_after_their_time(retained: Any) -> None:
    await retained.store.publish([one(n, idempotency_key=f"k{n}") for n in range(95)])
    count = "SELECT count(*) FROM soma.idempotency_keys"
    policy = RetentionPolicy(idempotency_keys=MONTH)
    assert await sweep(retained, policy, 29) == {}
    assert (await retained.pool.fetch(count))[0][0] == 95
    assert await sweep(retained, policy, 31) == {"idempotency_keys": 95}
    assert (await retained.pool.fetch(count))[0][0] == 0
    assert await sweep(retained, policy, 31) == {}


async def test_the_inbox_is_split_and_old_partitions_are_emptied(retained: Any) -> None:
    await applied(retained, *(one(n) for n in range(60)))
    assert await sweep(retained, INBOX, 0) == {}  # makes partitions, and the first mark
    names = [row[0] for row in await retained.pool.fetch("SELECT name FROM soma.inbox_partitions()")]
    assert names[0] == "inbox_first"
    assert len(names) == 3
    assert await inbox(retained) == {"soma.inbox_first": 60}
    assert await sweep(retained, INBOX, 20) == {}
    assert await sweep(retained, INBOX, 40) == {"inbox_partitions": 1}
    assert await inbox(retained) == {}
    horizon = (await retained.pool.fetch("SELECT inbox_horizon FROM soma.consumers"))[0][0]
    newest = (await retained.pool.fetch('SELECT max("timestamp") FROM soma.events'))[0][0]
    assert horizon > newest
    fresh = (await applied(retained, one(100)))[0]
    assert sum((await inbox(retained)).values()) == 1
    assert fresh.version == 1


async def test_an_inbox_that_is_kept_longer_than_since_1970_is_not_emptied(retained: Any) -> None:
    policy = RetentionPolicy(inbox=timedelta(days=99 * 365))
    await applied(retained, *(one(n) for n in range(20)))
    await sweep(retained, policy, 0)
    async with at(retained, 40) as pool:
        assert (await RetentionRun(pool, policy, None, who="tests").plan()).expired.inbox_partitions == 0
    assert await sweep(retained, policy, 40) == {}
    assert await inbox(retained) == {"soma.inbox_first": 20}
    assert (await retained.pool.fetch("SELECT inbox_horizon FROM soma.consumers"))[0][0] is None


async def test_a_replay_does_not_go_behind_what_was_emptied(retained: Any) -> None:
    await retained.publish(20)
    async with retained.log_worker():
        await retained.applied(20)
    await sweep(retained, INBOX, 0)
    await sweep(retained, INBOX, 40)
    async with ReplayEngine(retained.pool.settings, "billing") as engine:
        with pytest.raises(ReplayRefused, match="whole since"):
            await engine.plan(ReplayFilter(tenant_id=ALL_TENANTS))


async def test_an_old_id_that_was_applied_just_now_stays_known(retained: Any) -> None:
    """Its record may be delivered again at once, whatever the age of its id."""
    await sweep(retained, INBOX, 0)
    old = datetime.now(UTC) - timedelta(days=100)
    await applied(retained, *(one(n, made=old) for n in range(5)))
    assert sum((await inbox(retained)).values()) == 5
    await sweep(retained, INBOX, 0)
    assert sum((await inbox(retained)).values()) == 5  # no mark is old enough
    # A mark of long ago: the rows are newer than it.
    await retained.pool.fetch("UPDATE soma.retention_marks SET made_at = made_at - interval '3 days', ended_xid = '3'")
    assert await sweep(retained, INBOX, 40) == {"inbox_partitions": 1}
    assert await inbox(retained) == {"soma.inbox_first": 5}
    await retained.pool.fetch("DELETE FROM soma.retention_marks")
    assert await sweep(retained, INBOX, 40) == {}  # now a mark that is behind them
    assert await inbox(retained) == {"soma.inbox_first": 5}
    assert await sweep(retained, INBOX, 42) == {"inbox_partitions": 1}
    assert await inbox(retained) == {}
    desk = await Desk.open(retained.pool)
    again = await desk.claim(undelivered())
    assert again.fresh == (True,)  # and an insert of an old or new id never fails for want of a partition
    await applied(retained, one(50, made=old), one(51, made=datetime.now(UTC) + timedelta(days=4000)))


async def test_ids_of_the_far_future_do_not_stop_the_partitions(retained: Any) -> None:
    far = datetime(4000, 1, 1, tzinfo=UTC)
    await applied(retained, one(1), one(2, made=far))
    await sweep(retained, INBOX, 0)
    found = await inbox(retained)
    assert sorted(found.values()) == [1, 1]
    assert "soma.inbox_first" in found
    for days in (5, 10, 15, 20):
        await sweep(retained, INBOX, days)
    bounds = await retained.pool.fetch("SELECT from_id, until_id FROM soma.inbox_partitions()")
    assert [row[1] for row in bounds[:-1]] == [row[0] for row in bounds[1:]]
    assert sum((await inbox(retained)).values()) == 2


async def test_the_horizon_covers_events_that_were_published_long_after_their_ids(retained: Any) -> None:
    old = datetime.now(UTC) - timedelta(days=100)
    (late,) = await applied(retained, one(1, made=old))
    await sweep(retained, INBOX, 0)
    await sweep(retained, INBOX, 2)
    assert await inbox(retained) == {"soma.inbox_first": 1}
    swept = await sweep(retained, INBOX, 40)
    assert swept == {"inbox_partitions": 1}
    horizon = (await retained.pool.fetch("SELECT inbox_horizon FROM soma.consumers"))[0][0]
    assert horizon > late.timestamp


async def test_keys_of_the_inbox_go_after_their_time(retained: Any) -> None:
    await applied(retained, *(one(n, idempotency_key=f"k{n}") for n in range(95)))
    assert await sweep(retained, INBOX, 29) == {}
    assert await sweep(retained, INBOX, 31) == {"inbox_keys": 95}
    horizon = (await retained.pool.fetch("SELECT inbox_horizon FROM soma.consumers"))[0][0]
    assert horizon > datetime.now(UTC)


async def test_a_claim_that_holds_the_inbox_is_not_waited_for(retained: Any) -> None:
    desk = await Desk.open(retained.pool)
    async with retained.pool.transaction() as tx:
        assert (await desk.claim(undelivered(), tx=tx)).fresh == (True,)
        assert await sweep(retained, INBOX, 0, wait=False) == {}
        assert len(await retained.pool.fetch("SELECT FROM soma.inbox_partitions()")) == 1
    await sweep(retained, INBOX, 0)
    assert len(await retained.pool.fetch("SELECT FROM soma.inbox_partitions()")) == 3


async def test_settled_letters_go_with_their_history_and_open_ones_stay(retained: Any) -> None:
    desk = await Desk.open(retained.pool)
    given = [undelivered(f"k{n}") for n in range(30)]
    await desk.park(*given)
    for each in given[:25]:
        await desk.dlq.discard(await desk.id_of(each), reason="nobody needs it")
    policy = RetentionPolicy(letters=MONTH)
    assert await sweep(retained, policy, 29) == {"letters": 0}
    assert len(await desk.rows()) == 30
    assert await sweep(retained, policy, 31) == {"letters": 25}
    assert [status for _, status in await desk.rows()] == ["dead"] * 5
    orphans = "SELECT count(*) FROM soma.dead_letter_history h WHERE NOT EXISTS (SELECT FROM soma.dead_letters l WHERE l.letter_id = h.letter_id)"
    assert (await retained.pool.fetch(orphans))[0][0] == 0
    # Its record is still known to the inbox: delivered again, it is not applied.
    assert (await desk.claim(given[0])).fresh == (False,)


async def test_replays_that_are_over_go_and_forced_ones_stay(retained: Any) -> None:
    await retained.publish(5)
    async with retained.log_worker():
        await retained.applied(5)
        await retained.pool.fetch("SELECT soma.tick('0')")
    async with ReplayEngine(retained.pool.settings, "billing") as engine:
        wanted = ReplayFilter(tenant_id=ALL_TENANTS)
        for mode in ("missing", "force", "missing"):
            run = await engine.start(wanted, mode, requested_by="ann", reason="x")
            if len(await retained.pool.fetch("SELECT FROM soma.replays")) < 3:
                await engine.cancel(run.run_id)
    policy = RetentionPolicy(replays=MONTH)
    assert await sweep(retained, policy, 29) == {"replays": 0}
    assert await sweep(retained, policy, 31) == {"replays": 1}
    rows = await retained.pool.fetch("SELECT mode, state FROM soma.replays ORDER BY 1")
    assert [tuple(row) for row in rows] == [("force", "cancelled"), ("missing", "planned")]
