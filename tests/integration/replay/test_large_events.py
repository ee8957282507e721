"""Large events are read in pages of bounded size: by a consumer of the log, by replays, rebuilds and subscribers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from soma_common.cli import events as commands
from soma_common.consumer.handlers import HandlerContext
from soma_common.events import store
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.paging import PAGE_BYTES
from soma_common.log import source
from soma_common.postgres.pool import Pool, Row
from soma_common.replay import past
from soma_common.replay.models import ReplayState
from soma_common.replay.projection import Projection

COUNT, SIZE = 200, 500 * 1024
EFFECT = "INSERT INTO effect (event_id, number) VALUES ($1, $2)"
Fetch = Callable[..., Awaitable[list[Row]]]


async def apply(event: RecordedEvent, ctx: HandlerContext) -> None:
    await ctx.tx.execute(EFFECT, event.event_id, event.payload["n"])


class Seen:
    """The sizes of the pages of events that the database gave."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def around(self, fetch: Fetch) -> Fetch:
        """The same, and it notes rows of the log."""

        async def fetched(*args: Any) -> list[Row]:
            rows = await fetch(*args)
            if rows and len(rows[0]) == 21:
                self.pages.append(sum(len(row[5]) for row in rows))
            return rows

        return fetched

    def check(self) -> None:
        """All was read, and no more than one page's worth at once."""
        assert sum(self.pages) >= COUNT * SIZE
        assert max(self.pages) <= PAGE_BYTES
        self.pages.clear()


@pytest.fixture
async def seen(replays: Any, monkeypatch: pytest.MonkeyPatch) -> Seen:
    filler = "x" * SIZE
    for begin in range(0, COUNT, 20):
        await replays.store.publish(
            [Event(payload={"n": n, "x": filler}, event_type="order.paid", tenant_id="acme", aggregate_id=f"a{n % 10}")
             for n in range(begin, begin + 20)]
        )  # fmt: skip
    noted = Seen()
    for module in (source, past, store):
        monkeypatch.setattr(module, "fetch", noted.around(module.fetch))  # type: ignore[attr-defined]
    planned = Pool.fetch_planned

    async def fetch_planned(self: Pool, *args: Any) -> list[Row]:
        return await noted.around(lambda *given: planned(self, *given))(*args)

    monkeypatch.setattr(Pool, "fetch_planned", fetch_planned)
    return noted


async def test_large_events_are_consumed_and_replayed_in_bounded_pages(replays: Any, seen: Seen) -> None:
    await replays.passed_by(apply)
    assert await replays.count() == COUNT
    seen.check()
    await replays.forget()
    async with replays.engine(apply, page=2000) as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
    assert (done.state, done.counts.applied, await replays.count()) == (ReplayState.DONE, COUNT, COUNT)
    seen.check()
    async with replays.engine(apply) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=Projection(("effect",)))
        done = await replays.finish(engine, run)
    assert (done.state, done.counts.applied, await replays.count()) == (ReplayState.DONE, COUNT, COUNT)
    seen.check()
    numbers = [row[0] for row in await replays.pool.fetch("SELECT number FROM effect")]
    assert sorted(numbers) == list(range(COUNT))


async def test_large_events_are_followed_and_listed_in_bounded_pages(replays: Any, seen: Seen) -> None:
    following = replays.store.subscribe()
    assert [(await anext(following))[0].payload["n"] for _ in range(COUNT)] == list(range(COUNT))
    await following.aclose()
    seen.check()
    wanted = store.EventFilter(tenant_id="acme")
    for newest_first in (False, True):
        pages = [
            [event.payload["n"] for event in page]
            async for page in commands._pages(replays.store, wanted, 10_000, newest_first=newest_first)
        ]
        listed = [n for page in pages for n in page]
        assert (listed[::-1] if newest_first else listed) == list(range(COUNT))
        assert max(seen.pages) <= (commands._AT_ONCE + 1) * (SIZE + 100)
