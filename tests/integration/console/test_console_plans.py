"""No page reads a large table from its beginning to its end; counts stop at their bounds."""

from __future__ import annotations

import pytest

from benchmarks.console import LARGE, fill, pages, plans, whole_scans
from soma_common.console.letters import BOUND
from soma_common.postgres.pool import Pool
from tests.console_shop import config_of

pytestmark = pytest.mark.timeout(240)


async def test_pages_walk_along_indexes(soma_database: str) -> None:
    async with Pool(soma_database) as pool:
        await fill(pool, events=60_000, letters=25_000, sagas=5_000)
        wanted = await pages(pool)
    found = await plans(config_of(soma_database), wanted)
    assert {
        name: scans for name, each in found.items() if (scans := [s for plan in each for s in whole_scans(plan)])
    } == {}
    kinds = next(plan for plan in found["letters"] if "WITH RECURSIVE" in plan)
    assert "dead_letters_kinds_idx" in kinds
    assert "dead_letters_tenant_kinds_idx" in "".join(found["letters, one tenant"])
    assert BOUND < 25_000


def test_the_search_for_whole_scans_finds_them() -> None:
    assert "events" in LARGE
    plan = "->  Seq Scan on events_p0 e (actual rows=3.00 loops=1)\n      Filter: x\n      Rows Removed by Filter: 9000\n  ->  Index"
    assert whole_scans(plan) == ["events_p0"]
    assert whole_scans("->  Seq Scan on events_p0 e (actual rows=0.00 loops=1)\n      Filter: x\n  -> Index") == []
    assert whole_scans("->  Parallel Seq Scan on dead_letters l (actual rows=90000.00 loops=1)") == ["dead_letters"]
