"""One stay at a source: from the claim of the positions to the stop, or to the first error that ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from soma_common.consumer.attempts import Attempts
from soma_common.consumer.gate import Gate
from soma_common.consumer.lanes import Lanes
from soma_common.consumer.pipeline import PASSING, Memory, Parts, Pipeline
from soma_common.consumer.positions import Positions
from soma_common.consumer.redrive import Redriver
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Record, Source
from soma_common.consumer.suspects import Suspects
from soma_common.consumer.tally import Tally
from soma_common.consumer.watchdog import Beat, Progress, Watchdog
from soma_common.errors import DatabaseSetBack, LeaseLost, OffsetLost
from soma_common.inbox import LaneCount
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_SQL = blocks("consumer")
_FETCH: Final = 1000  # records at once
_ROOM: Final = 0.005  # seconds between two looks whether a full partition has room again


class Session:
    """Fetches, hands out to lanes, saves positions; everything it holds is forgotten when it ends.

    Args:
        lanes: a row in the database for each lane.
        memory: of events that failed in earlier sessions.
        progress: when the consumer last got on, in earlier sessions too.
    """

    def __init__(
        self, pool: Pool, source: Source, parts: Parts, settings: ConsumerSettings, tally: Tally,
        memory: Memory, progress: Progress, lanes: Sequence[LaneCount],
    ) -> None:  # fmt: skip
        self._pool, self._source, self._settings, self._memory = pool, source, settings, memory
        self._tally, self._progress = tally, progress
        self.positions = Positions(settings.ahead, settings.ahead_bytes)
        self.pipeline = Pipeline(parts, Gate(len(lanes)), tally, memory, self._settle)
        self._lanes = Lanes(lanes, settings.batch, parts.sequence_of, self.pipeline.apply)
        self._suspects = Suspects(
            Attempts(pool, parts.inbox.consumer_id, memory.begun), self.positions, settings,
            hand_out=self._lanes.put, condemn=memory.condemn,
        )  # fmt: skip
        self._saving = asyncio.Lock()
        self._fetches, self._saves = Beat(), Beat()

    @property
    def held(self) -> int:
        """How many records wait for a next try, their followers included."""
        return sum(lane.held for lane in self._lanes)

    @property
    def single_file(self) -> bool:
        """Whether partitions are suspect and events are begun one by one."""
        return bool(self._suspects.partitions)

    async def run(
        self, stopping: asyncio.Event, redriver: Redriver, alive: Callable[[], None], hang_up: Callable[[], object]
    ) -> None:
        """Work until asked to stop, then drain; ``alive`` is called whenever the source was heard.

        Args:
            hang_up: ends the connections of this consumer.

        Raises:
            InfrastructureError, TransactionConflict, ClockAhead, LeaseLost: begin another session.
        """
        watchdog = self._watchdog(redriver, hang_up)
        try:
            async with asyncio.TaskGroup() as group:
                work = [
                    group.create_task(work)
                    for work in (
                        self._lanes.run(), self._suspects.run(), self._keep_saving(), redriver.run(),
                        watchdog.run(), self._keep_unblocked(),
                    )
                ]  # fmt: skip
                while not stopping.is_set():
                    await self._fetch()
                    self._fetches.now()
                    alive()
                self._fetches.rest()
                await self.drain(self._source.assigned)
                for task in work:
                    task.cancel()
        except BaseExceptionGroup as group_of_errors:
            raise _worst(group_of_errors) from group_of_errors

    def _watchdog(self, redriver: Redriver, hang_up: Callable[[], object]) -> Watchdog:
        return Watchdog(
            self._settings, self._tally, self._progress, self._memory, lanes=list(self._lanes),
            redrives=redriver.lanes, gate=self.pipeline.gate, waiting=self._waiting,
            beats={"the source of events": self._fetches, "PostgreSQL while positions were saved": self._saves},
            hang_up=hang_up,
        )  # fmt: skip

    def _waiting(self) -> bool:
        return self._suspects.waiting or len(self.positions) <= self.held

    def _settle(self, records: Iterable[Record]) -> None:
        self.positions.settle(records)
        self._suspects.settled()

    async def _fetch(self) -> None:
        full = self.positions.full()
        if full and full >= self._source.assigned - self._source.halted:
            await self._source.stay(_ROOM)
            return
        records = await self._source.fetch(_FETCH, full)
        if not records:
            return
        await self._suspects.look(records)
        records = [record for record in records if self._may_go(record)]
        self.positions.open(records)
        self._lanes.put(self._suspects.sift(records))

    def _may_go(self, record: Record) -> bool:
        if not self._source.delivers(record):
            return False
        if isinstance(record.error, OffsetLost):
            self._source.halt(record.partition)
            self._memory.halted[record.partition] = record.error
            log.error("Consuming of %s stopped: %s", record.partition, record.error)
            return False
        return True

    async def drain(self, partitions: Collection[Partition]) -> None:
        """Let what is in flight of these partitions end, at most ``settings.drain`` seconds, and save."""
        ended = await self._lanes.leave(partitions, self._settings.drain)
        try:
            await self._save(leaving=list(partitions))
        except (LeaseLost, *PASSING) as error:
            log.warning("Positions were not saved before partitions were given away: %s", error)
        if not ended:  # only now: it ends the session as well
            self._abandon(partitions)
        self.positions.forget(partitions)
        self._suspects.forget(list(partitions))
        self.pipeline.forget(partitions)

    def _abandon(self, partitions: Collection[Partition]) -> None:
        for lane in self._lanes:
            if lane.task is not None and any(record.partition in partitions for record in lane.working):
                log.warning("A batch did not end within %.1f s and is abandoned.", self._settings.drain)
                lane.give_up(lane.task)

    async def _keep_saving(self) -> None:
        while True:
            await asyncio.sleep(self._settings.save_every)
            self._saves.now()
            await self._save()
            self._saves.now()

    async def _keep_unblocked(self) -> None:
        """Wait for no former owner that was stopped in the middle of a statement."""
        silence = self._settings.idle_timeout
        while True:
            await asyncio.sleep(silence / 2)
            ended = await self._pool.fetch(_SQL["end_silent"], silence)
            if ended:
                log.warning(
                    "%d transactions that kept events waiting were ended: their clients are silent.", len(ended)
                )

    async def _save(self, leaving: Sequence[Partition] = ()) -> None:
        """Write how far every partition is settled, unless the database was set back meanwhile."""
        async with self._saving:
            self._prune()
            moved, counts = self.positions.moved(), self._lanes.counts
            moved = [record for record in moved if self._source.delivers(record) or record.partition in leaving]
            if not moved and not leaving:
                return
            first = self._suspects.moved(moved)
            async with self._pool.transaction(bound=SHORT) as tx:
                if moved:
                    await self._check_lanes(tx, counts)
                    await self._source.save(tx, moved)
                if first:
                    await self._suspects.save_moved(tx, first)
                await self._suspects.leave(tx, leaving)
            self._suspects.were_saved(first)
            await self._source.saved(moved)

    def _prune(self) -> None:
        """Forget partitions that were taken from us without a word."""
        lost = self.positions.partitions - self._source.assigned
        if lost:
            self.positions.forget(lost)
            self._lanes.drop(lost)
            self._suspects.forget(list(lost))
            self.pipeline.forget(lost)

    async def _check_lanes(self, tx: object, counts: Sequence[LaneCount]) -> None:
        columns = ([count.lane_id for count in counts], [count.batches for count in counts])
        if await fetch(tx, _SQL["lanes_behind"], columns):
            raise DatabaseSetBack("The database was set back to an earlier moment: effects of this consumer are gone.")


def _worst(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of several errors the one that no retry mends, if there is one."""
    errors = list(_flat(group))
    lasting = [error for error in errors if not isinstance(error, (LeaseLost, *PASSING))]
    return (lasting or errors)[0]


def _flat(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [each for inner in error.exceptions for each in _flat(inner)]
    return [error]
