"""Replays of a log of which something is in archives: what a plan counts, and what a rebuild must not leave out."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.consumer.handlers import EVERY_TYPE, Handlers
from soma_common.errors import ReplayRefused
from soma_common.events.store import ALL_TENANTS
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import Progress, ReplayFilter, ReplayState
from soma_common.replay.projection import Projection
from soma_common.replay.rebuilding import RebuildSettings
from soma_common.retention.catalog import Force
from soma_common.retention.reader import ArchiveReader
from soma_common.sql.loader import blocks
from tests.integration.consumer.conftest import apply
from tests.integration.retention.test_retention_killed import ended, lease_over, process

EVERYTHING = ReplayFilter(tenant_id=ALL_TENANTS)
EFFECTS = Projection(("effect",))


def engine(retained: Any) -> ReplayEngine:
    handlers = Handlers()
    handlers.add(apply, EVERY_TYPE)
    settings = ReplaySettings(batch=50, page=120, rebuild=RebuildSettings(page=50))
    archive = ArchiveReader(retained.storage)
    return ReplayEngine(retained.pool.settings, "billing", handlers=handlers, settings=settings, archive=archive)


async def applied(retained: Any, count: int) -> None:
    async with retained.log_worker():
        await retained.applied(count)
        await retained.passed()


async def accepted(retained: Any, reader: str = "consumer:billing") -> None:
    """It goes on with what is left."""
    await retained.pool.fetch(blocks("retention")["accept"], reader, "ann", "it has had them")


async def run_on(replays: ReplayEngine, run: Progress) -> Progress:
    last = run
    async for progress in replays.run(run.run_id):
        last = progress
    return last


async def test_a_rebuild_does_not_leave_out_in_silence_what_is_gone(retained: Any) -> None:
    """Its tables would lack those effects, and take the place of tables that have them."""
    await retained.fill(300)
    await applied(retained, 300)
    assert (await retained.retain()).removed
    await accepted(retained)  # for the live consumer, which has applied all
    async with engine(retained) as replays:
        run = await replays.start(EVERYTHING, "rebuild", projection=EFFECTS)
        with pytest.raises(ReplayRefused, match="its tables would lack their effects"):
            await run_on(replays, run)
        assert (await replays.progress(run.run_id)).state is ReplayState.FAILED
        assert await retained.count() == 300
        await accepted(retained, f"replay:{run.run_id}")
        await replays.resume(run.run_id)
        assert (await run_on(replays, run)).state is ReplayState.DONE
    assert await retained.count() == len(await retained.log()) < 300


async def test_one_that_is_under_way_ends_with_a_word(retained: Any) -> None:
    await retained.fill(300)
    await applied(retained, 300)
    async with engine(retained) as replays:
        run = await replays.start(EVERYTHING, "rebuild", projection=EFFECTS)
        async for _ in replays.run(run.run_id):
            break  # a page is applied
        assert (await retained.retain(force=Force("ann", "the disk is full"))).removed
        await accepted(retained)
        with pytest.raises(ReplayRefused, match="its tables would lack their effects"):
            await run_on(replays, run)
        await replays.cancel(run.run_id)
    assert await retained.count() == 300


@pytest.mark.parametrize(("stage", "whole"), [("verified", True), ("dropped", True), ("thinned", False)])
async def test_a_plan_counts_what_is_in_the_log_and_in_archives_once(retained: Any, stage: str, whole: bool) -> None:
    await retained.fill(300, types=("order.paid", "telemetry.seen"))
    await applied(retained, 300)
    code, err = await ended(process(retained, whole=whole, die={"stage": stage, "after": 2}))
    assert code < 0, err
    await lease_over(retained)
    assert await retained.archives()
    async with engine(retained) as replays:
        plan = await replays.plan(EVERYTHING)
        assert (plan.total, sum(plan.by_type.values())) == (300, 300)
        assert (await run_on(replays, await replays.start(EVERYTHING))).counts.read == plan.total
