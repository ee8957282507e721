"""One process at one run: reads, applies, waits through failures of the world, and stops when it is told to."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from uuid import UUID

from soma_common.consumer.pipeline import PASSING
from soma_common.consumer.source import Record
from soma_common.errors import HandlerFailed, LeaseLost, ReplayRefused, SomaError
from soma_common.pacing import TokenBucket
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import Pool
from soma_common.replay.applying import Batches
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import Offset, Progress, ReplayState
from soma_common.replay.reading import LogPages, Pages, cursor_after
from soma_common.retry import Backoff
from soma_common.tasks import end

log = logging.getLogger(__name__)

_STOPPED = (ReplayState.PAUSED, ReplayState.CANCELLED)


class Runner:
    """Brings a claimed run to its end.

    Args:
        owner: the number under which the run was claimed.
        batch: most events in one transaction.
        page: most events fetched by one query.
        pages: what a run reads; without it, the log.
    """

    def __init__(
        self, pool: Pool, checkpoints: Checkpoints, batches: Batches, run: Progress, owner: UUID, *,
        batch: int, page: int, backoff: Backoff, pages: Callable[[Progress], Pages] | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self._pool, self._checkpoints, self._batches, self._owner = pool, checkpoints, batches, owner
        # Never more than a second's worth at once: a slow rate means small transactions, not long waits inside them.
        self._batch = batch if run.rate is None else max(1, min(batch, int(run.rate)))
        self._page, self._backoff = page, backoff
        self._bucket = TokenBucket(run.rate, burst=self._batch)
        self._tries, self._doubtful = 0, False
        self._make_pages: Callable[[Progress], Pages] = pages or (lambda run: LogPages(pool, run))
        self._begin(run)

    def _begin(self, run: Progress) -> None:
        """Go on from what is stored."""
        self.run, self._waiting = run, deque[Record]()
        self._cursor: Cursor | Offset = run.cursor
        self._after: Cursor | Offset = run.cursor
        self._pages: Pages = self._make_pages(run)

    async def steps(self) -> AsyncGenerator[Progress, None]:
        """Apply batch after batch; the progress after each, and at the end.

        Raises:
            HandlerFailed: an event failed; the run is failed and stands before it.
            LeaseLost: another process took the run.
            ReplayRefused: the inbox's horizon was raised above the run's beginning; the run is failed.
        """
        heart = asyncio.create_task(self._beat(), name=f"replay {self.run.run_id} lease")
        try:
            while await self._turn():
                yield self.run
            yield await self._finish()
        except LeaseLost as lost:
            yield await self._stopped(lost)
        except (HandlerFailed, ReplayRefused) as error:
            await self._fail(error)
            raise
        finally:
            await self._pages.close()
            await end(heart)
            with suppress(*PASSING):  # it expires by itself
                await self._checkpoints.leave(self.run)

    async def _turn(self) -> bool:
        """One batch, or one wait; False at the end."""
        try:
            if self._doubtful:
                # Under a new epoch: a transaction of unknown outcome took effect, and is read here, or never will.
                await self._pages.close()
                self._begin(await self._claimed())
                self._doubtful = False
            if not self._waiting and not await self._refill():
                return False
            if self._waiting:
                await self._apply()
            self._tries = 0
        except PASSING as error:
            log.log(logging.INFO if self._tries else logging.WARNING, "Replay %s waits: %s", self.run.run_id, error)
            await asyncio.sleep(self._backoff.delay(self._tries))
            self._tries += 1
            self._doubtful = True
        return True

    async def _refill(self) -> bool:
        page = await self._pages.next(self._cursor, self._page)
        if page is None:
            return False
        self._waiting.extend(page.records)
        self._after = page.after
        if not page.records:
            self._cursor = page.after
        return True

    async def _apply(self) -> None:
        count = min(self._batch, len(self._waiting))
        records = [self._waiting[place] for place in range(count)]
        if delay := self._bucket.take(count):
            await asyncio.sleep(delay)
        counts = await self._batches.apply(self.run, records)
        for _ in records:
            self._waiting.popleft()
        cursor = cursor_after(records[-1])
        self._cursor = cursor if self._waiting else self._after
        self.run = self.run.advanced(cursor, counts)

    async def _claimed(self) -> Progress:
        try:
            return await self._checkpoints.claim(self.run.run_id, self._owner)
        except ReplayRefused as error:
            raise LeaseLost(error.message) from error

    async def _finish(self) -> Progress:
        """Mark the run as done. Whoever paused it in the last moment wins."""
        while True:
            try:
                done = await self._checkpoints.turn(
                    self.run.run_id, [ReplayState.RUNNING], ReplayState.DONE, epoch=self.run.epoch
                )
                found = await self._checkpoints.find(self.run.run_id)
                if not done and found.state is not ReplayState.DONE:
                    raise LeaseLost(f"Replay {self.run.run_id} is not this process's any more.")
                return found
            except PASSING:
                await asyncio.sleep(self._backoff.delay(self._tries))
                self._tries += 1

    async def _stopped(self, lost: LeaseLost) -> Progress:
        """Why the run is not ours: paused or cancelled is an end as any other."""
        found = await self._checkpoints.find(self.run.run_id)
        if found.state in _STOPPED:
            return found
        if found.state is ReplayState.RUNNING and found.epoch == self.run.epoch:
            error = ReplayRefused(
                "The consumer's inbox was cleaned beyond the beginning of this replay while it ran.",
                cure="start a new one with a later since.",
            )
            await self._fail(error)
            raise error from lost
        raise lost

    async def _fail(self, error: SomaError) -> None:
        log.error("Replay %s failed: %s", self.run.run_id, error)
        await self._checkpoints.turn(
            self.run.run_id, [ReplayState.RUNNING], ReplayState.FAILED, epoch=self.run.epoch, error=error.message
        )

    async def _beat(self) -> None:
        """Keep the run while a batch or a wait takes long."""
        while True:
            await asyncio.sleep(self._checkpoints.lease.total_seconds() / 3)
            with suppress(*PASSING, LeaseLost):  # the next save tells
                await self._checkpoints.renew(self.run)
