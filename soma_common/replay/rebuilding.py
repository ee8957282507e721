"""One process at one rebuild: fills the new tables behind the live consumer, catches up, and swaps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from soma_common.ahead import Ahead
from soma_common.consumer.effects import Effects
from soma_common.consumer.pipeline import PASSING, Begin
from soma_common.consumer.source import Record
from soma_common.errors import HandlerFailed, LeaseLost, ReplayRefused, SomaError
from soma_common.inbox import LaneCount
from soma_common.pacing import TokenBucket
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, fetch
from soma_common.ranges import check_settings
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.filling import Filling
from soma_common.replay.mirror import mirrored
from soma_common.replay.models import Counts, Progress, ReplayState
from soma_common.replay.past import Past
from soma_common.replay.projection import Shadow
from soma_common.replay.reading import Page
from soma_common.replay.swapping import NotNow, Swap
from soma_common.retry import Backoff
from soma_common.sql.loader import blocks
from soma_common.tasks import end

log = logging.getLogger(__name__)

_LOOK: Final = 0.05  # seconds between two looks whether the live consumer has moved
_TELL: Final = 10.0  # seconds between two words about that
_STOPPED = (ReplayState.PAUSED, ReplayState.CANCELLED, ReplayState.DONE)


class _Over(Exception):
    """The run is not ours to go on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildSettings:
    """How rebuilds work. Times are seconds.

    Args:
        lanes: transactions at once, each on a connection of its own; 1 where the consumer orders by partition.
        page: events that are read at once, and applied before the next are.
        swap_lag: the swap is tried when the live consumer is at most so many positions from the end of the log.
        swap_wait: how long the first try of a swap waits for batches in flight and readers of the old tables, which
            live batches wait for as well; each further try waits twice as long, up to ``swap_within``.
        swap_within: most time for the rest of a try.
        swap_every: least rest between two tries; it is at least nine times as long as the last try took.
    """

    lanes: int = 4
    page: int = 2000
    swap_lag: int = 20_000
    swap_wait: float = 0.2
    swap_within: float = 5.0
    swap_every: float = 0.5

    def __post_init__(self) -> None:
        check_settings(
            self, lanes=(1, 100), page=(1, 10_000), swap_lag=(1, 1_000_000), swap_wait=(0.001, 60),
            swap_within=(0.1, 600), swap_every=(0.001, 600),
        )  # fmt: skip


class Rebuilder:
    """Brings a claimed rebuild to its end.

    Args:
        begin: how a transaction begins that handlers work in.
        owner: the number under which the run was claimed.
        past: what it reads, from the stored cursor of a run.
        swap: False: end when the new tables have caught up; the run can be taken up again.
    """

    def __init__(
        self, pool: Pool, begin: Begin, checkpoints: Checkpoints, effects: Effects, run: Progress, shadow: Shadow,
        owner: UUID, *, past: Callable[[Progress], Past], settings: RebuildSettings, silence: float, backoff: Backoff,
        swap: bool = True,
    ) -> None:  # fmt: skip
        self.run = run
        self._pool, self._transaction, self._checkpoints = pool, begin, checkpoints
        self._effects, self._shadow = effects, shadow
        self._owner, self._settings, self._silence, self._backoff = owner, settings, silence, backoff
        self._make_past, self._swaps, self._tries = past, swap, 0
        self._most = settings.page if run.rate is None else max(1, min(settings.page, int(run.rate)))
        self._bucket = TokenBucket(run.rate, burst=self._most)
        self._patience, self._analyzed, self._told = settings.swap_wait, False, 0.0
        self._pages: Ahead[Page | None] = Ahead()
        self._filling: Filling | None = None
        self._lanes: Sequence[LaneCount] = ()

    async def steps(self) -> AsyncGenerator[Progress, None]:
        """Apply page after page, then swap; the progress after each, and at the end.

        Raises:
            HandlerFailed: an event failed; the run is failed, and the live tables go on as they were.
            ReplayRefused: the tables cannot be rebuilt; the run is failed.
            LeaseLost: another process took the run.
        """
        heart = asyncio.create_task(self._beat(), name=f"rebuild {self.run.run_id} lease")
        try:
            while await self._turn():
                yield self.run
            yield self.run
        except _Over as over:
            yield await self._stopped(over)
        except (HandlerFailed, ReplayRefused) as error:
            await self._fail(error)
            raise
        finally:
            await end(heart)
            await self._pages.forget()
            with suppress(*PASSING):  # they go by themselves
                await self._forget()
                await self._checkpoints.leave(self.run)

    async def _turn(self) -> bool:
        """One page, one try of a swap, or one wait; False at the end.

        Raises:
            _Over: the run is another process's, was paused, cancelled, or is done.
        """
        try:
            if self._filling is None:
                await self._begin()
            goes_on = await self._work()
            self._tries = 0
            return goes_on
        except LeaseLost as lost:  # of the run, or the database was set back: its row tells
            log.info("Rebuild %s begins again: %s", self.run.run_id, lost)
        except PASSING as error:
            log.log(logging.INFO if self._tries else logging.WARNING, "Rebuild %s waits: %s", self.run.run_id, error)
            await asyncio.sleep(self._backoff.delay(self._tries))
            self._tries += 1
        self._filling = None
        return True

    async def _begin(self) -> None:
        """Go on from what is stored, under a new epoch: what was in flight took effect, or never will."""
        await self._pages.forget()
        try:
            self.run = await self._checkpoints.claim(self.run.run_id, self._owner)
        except ReplayRefused as refused:
            raise _Over(refused.message) from refused
        if (await self._pool.fetch(blocks("rebuilds")["cleaned_meanwhile"], self.run.inbox_id))[0][0]:
            raise ReplayRefused(
                "The inbox of this rebuild was cleaned while it ran: what is applied of its last page is not known.",
                cure="cancel it and start again; clean inboxes when no rebuild is under way.",
            )
        await self._forget()
        rows = await self._pool.fetch(blocks("consumer")["make_lanes"], self.run.inbox_id, self._settings.lanes)
        self._lanes = [LaneCount(int(row[0]), 0) for row in rows]
        self._past = self._make_past(self.run)
        self._filling = Filling(self._transaction, self._effects, self.run, self._shadow, self._lanes, self._silence)

    async def _forget(self) -> None:
        lanes, self._lanes = self._lanes, ()
        if lanes:
            await self._pool.fetch(blocks("consumer")["leave_lanes"], [lane.lane_id for lane in lanes])

    async def _work(self) -> bool:
        if not self._pages:
            self._pages.begin(self._past.next(self._most))
        page = await self._pages.take()
        if page is not None:
            if page.records:
                self._pages.begin(self._past.next(self._most))  # read while these are applied
                await self._fill(page)
            return True
        await self._applied(())  # letters that were resolved meanwhile
        if (behind := await self._past.behind()) > self._settings.swap_lag:
            self._tell_behind(behind)
            await asyncio.sleep(_LOOK)
            return True
        return await self._try_swap() if self._swaps else False

    def _tell_behind(self, behind: int) -> None:
        """Say now and then what a rebuild waits for."""
        now = time.monotonic()
        if now - self._told > _TELL:
            log.info("Rebuild %s waits: the live consumer is %d positions behind the log.", self.run.run_id, behind)
            self._told = now

    async def _fill(self, page: Page) -> None:
        if delay := self._bucket.take(len(page.records)):
            await asyncio.sleep(delay)
        counts = await self._applied(page.records)
        async with self._pool.transaction(bound=SHORT) as tx:
            await self._check_lanes(tx)
            await self._checkpoints.save(tx, self.run, page.after, counts)
        self.run = self.run.advanced(page.after, counts)

    async def _applied(self, records: Sequence[Record]) -> Counts:
        """Apply a page. Letters that were resolved meanwhile go first, as often as there are any."""
        assert self._filling is not None
        while True:
            async with self._pool.connection() as connection:
                freed, items = await mirrored(connection, self.run, records, self._past.decode)
            if not freed:
                return await self._filling.apply(items)
            await self._filling.apply(freed)

    async def _check_lanes(self, tx: Any) -> None:
        assert self._filling is not None
        counts = [lane.count for lane in self._filling.lanes]
        columns = ([count.lane_id for count in counts], [count.batches for count in counts])
        if await fetch(tx, blocks("consumer")["lanes_behind"], columns):
            raise LeaseLost("The database was set back to an earlier moment: effects of this rebuild are gone.")

    async def _try_swap(self) -> bool:
        """False when it is done."""
        assert self._filling is not None
        if not self._analyzed:
            await self._shadow.analyze(self._pool)
            self._analyzed = True
            return True
        most = self._settings.swap_lag
        swap = Swap(
            self._transaction, self._checkpoints, self._past, self._filling, self._shadow,
            within=self._settings.swap_within, most=most,
        )  # fmt: skip
        began = time.monotonic()
        try:
            await swap.attempt(self.run, self._patience)
        except NotNow as why:
            log.info("Rebuild %s: no swap yet: %s.", self.run.run_id, why)
            self._patience = min(2 * self._patience, self._settings.swap_within)
            # Live traffic stood still meanwhile: it shall have ten times as long for itself.
            await asyncio.sleep(max(self._settings.swap_every, 9 * (time.monotonic() - began)))
            return True
        self.run = await self._checkpoints.find(self.run.run_id)
        return False

    async def _stopped(self, over: _Over) -> Progress:
        """Why the run is not ours: paused or cancelled is an end as any other, and a swap may have taken effect."""
        found = await self._checkpoints.find(self.run.run_id)
        if found.state in _STOPPED:
            self.run = found
            return found
        raise LeaseLost(str(over)) from over

    async def _fail(self, error: SomaError) -> None:
        log.error("Rebuild %s failed: %s", self.run.run_id, error)
        await self._checkpoints.turn(
            self.run.run_id, [ReplayState.RUNNING], ReplayState.FAILED, epoch=self.run.epoch, error=error.message
        )

    async def _beat(self) -> None:
        """Keep the run while a page or a wait takes long."""
        while True:
            await asyncio.sleep(self._checkpoints.lease.total_seconds() / 3)
            with suppress(*PASSING, LeaseLost):  # the next batch tells
                await self._checkpoints.renew(self.run)
