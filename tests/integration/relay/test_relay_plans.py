"""The hot queries go along their indexes, however little the planner knows."""

from __future__ import annotations

import pytest

from soma_common.outbox.queue import Outbox
from soma_common.postgres.cursor import BEGINNING
from soma_common.postgres.pool import fetch
from soma_common.sql.loader import blocks
from tests.integration.relay.lab import World


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_a_page_reads_no_more_than_its_rows(lab: World, mode: str) -> None:
    await lab.write(4000, keys=200, batch=500)
    tick = await lab.store.ticks.latest()
    arguments = ([0, 1], [0, 0], [tick.position_after] * 2, ["1"] * 2, [tick.snapshot] * 2, 20)
    async with lab.pool.transaction() as connection:
        await fetch(connection, "SELECT set_config('plan_cache_mode', $1, true)", (mode,))
        await fetch(connection, blocks("outbox")["ordered"], ())
        rows = await fetch(
            connection, "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) " + blocks("outbox")["pages"], arguments
        )
    plan = "\n".join(row[0] for row in rows)
    assert "Merge Append" in plan
    assert "Sort Method" not in plan
    assert "Seq Scan" not in plan
    assert "Index Scan using outbox_0_shard_position_idx" in plan
    # Twenty rows each, and one more that the merge looks at.
    assert "(actual rows=20.00 loops=2)" in plan


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_stragglers_are_found_by_transaction_id(lab: World, mode: str) -> None:
    await lab.write(4000, keys=200, batch=500)
    tick = await lab.store.ticks.latest()
    arguments = ([0, 1], [0, 0], [tick.position_after] * 2, ["{800,801}"] * 2, 20)
    async with lab.pool.transaction() as connection:
        await fetch(connection, "SELECT set_config('plan_cache_mode', $1, true)", (mode,))
        rows = await fetch(connection, "EXPLAIN (COSTS OFF) " + blocks("outbox")["stragglers"], arguments)
    plan = "\n".join(row[0] for row in rows)
    assert "outbox_0_xid_idx" in plan, plan
    assert "shard_position_idx" not in plan, plan


async def test_pages_are_the_rows_of_their_groups_in_order(lab: World) -> None:
    await lab.write(300, keys=40, batch=50)
    diff = await lab.store.ticks.next_diff(BEGINNING, await lab.store.ticks.latest())
    assert diff is not None
    outbox = Outbox(lab.pool, "relay:plans")
    pages = await outbox.pages(dict.fromkeys(range(8), diff), 1000)
    found = [row for page in pages.values() for row in page.rows]
    assert sorted(row[0] for row in found) == [event.position for event in lab.journal.committed]
    for shard, page in pages.items():
        positions = [row[0] for row in page.rows]
        assert positions == sorted(positions)
        assert {row[10] for row in page.rows} <= {shard}
        assert not page.full
    short = (await outbox.pages({0: diff}, 3))[0]
    assert short.full
    assert short.rows == pages[0].rows[:3]
