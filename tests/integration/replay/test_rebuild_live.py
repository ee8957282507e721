"""Swaps, one after the other, under live traffic: two workers, one of them killed again and again, letters, re-drives."""

from __future__ import annotations

from soma_common.postgres.pool import Pool
from tests.swaps.run import CHECKS, Plan, under_load


async def test_swaps_under_load_with_workers_that_die(soma_database: str) -> None:
    """The full size of it is ``python -m tests.swaps``, on an idle machine."""
    plan = Plan(dsn=soma_database, rate=300, swaps=4, keys=60, lanes=2, fail_every=101, seed=7)
    async with under_load(plan) as run:
        for _ in range(plan.swaps):
            done = await run.swap()
            assert done.wrong == dict.fromkeys(CHECKS, 0)
            assert done.read > 0
    async with Pool(soma_database) as pool:
        inboxes = await pool.fetch("SELECT count(DISTINCT consumer_id), count(*) FROM soma.inbox")
        assert tuple(inboxes[0]) == (1, run.published)
        letters = await pool.fetch(
            "SELECT count(*), count(*) FILTER (WHERE status = 'resolved') FROM soma.dead_letters"
        )
        assert letters[0][0] == letters[0][1] >= run.published // 101
        mails = await pool.fetch("SELECT count(*), count(DISTINCT event_id) FROM mail")
        assert tuple(mails[0]) == (run.published, run.published), "each mail was sent, once"
