"""Twenty blue-green swaps under 5,000 events per second, each compared with a full recompute.

    python -m tests.swaps --rate 5000 --swaps 20 --workers 2

Needs an idle machine. Each rebuild reads all that was ever published, so on a small machine every swap takes longer than
the one before; after ``--fresh-every`` swaps they begin again on an empty database. Without ``--dsn`` it starts a
PostgreSQL of its own for each of those. Prints a line per swap; exit code 1 when a table was ever wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from soma_common.postgres.migrate import upgrade
from soma_common.testing.lane.postgres import PostgresServer
from tests.swaps.run import Plan, under_load


def main() -> int:
    """Run, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.swaps", description=__doc__)
    parser.add_argument("--dsn", default="", help="an empty database; it is brought up to date")
    parser.add_argument("--rate", type=int, default=5000, help="events per second")
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--fresh-every", type=int, default=5, help="swaps on one database; ignored with --dsn")
    parser.add_argument("--workers", type=int, default=2, help="live processes")
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=4, help="of each worker")
    parser.add_argument("--fail-every", type=int, default=5003, help="such events fail when they come live; 0: none")
    parser.add_argument("--no-kill", action="store_true", help="let the workers live")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wrong, each = 0, max(1, given.swaps if given.dsn else given.fresh_every)
    for first in range(0, given.swaps, each):
        server = None if given.dsn else PostgresServer.start()
        try:
            plan = Plan(
                dsn=given.dsn or server.dsn, rate=given.rate, swaps=min(given.swaps - first, each),
                workers=given.workers, keys=given.keys, lanes=given.lanes, fail_every=given.fail_every,
                kill=not given.no_kill, seed=given.seed + first,
            )  # fmt: skip
            wrong += asyncio.run(_swaps(plan, first))
        finally:
            if server is not None:
                server.close()
    return 1 if wrong else 0


async def _swaps(plan: Plan, before: int) -> int:
    """How many comparisons found something wrong."""
    await upgrade(plan.dsn)
    wrong = 0
    async with under_load(plan) as run:
        for number in range(before + 1, before + plan.swaps + 1):
            done = await run.swap()
            bad = {name: count for name, count in done.wrong.items() if count}
            wrong += bool(bad)
            print(
                f"swap {number:3}: {done.seconds:6.1f} s, {done.read:>9} read ({done.read / done.seconds:8.0f}/s), "
                f"{done.held} held, longest stall {1000 * done.stall:6.0f} ms, {run.published:>9} published, "
                f"{bad or 'equal to a full recompute'}",
                flush=True,
            )
    bad = {name: count for name, count in (await _final(plan)).items() if count}
    print(f"every event arrived; {bad or 'the tables are equal to a full recompute'}")
    return wrong + bool(bad)


async def _final(plan: Plan) -> dict[str, int]:
    from soma_common.events.append import AppendSettings
    from soma_common.events.store import EventStore
    from soma_common.postgres.pool import Pool
    from tests.swaps.run import Run

    async with Pool(plan.dsn) as pool:
        return await Run(plan, pool, EventStore(pool, AppendSettings("swaps"))).compare()


if __name__ == "__main__":
    sys.exit(main())
