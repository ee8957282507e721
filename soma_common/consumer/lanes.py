"""Sequences spread over lanes: in order within a sequence, several sequences at once."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from soma_common.consumer.order import SequenceOf
from soma_common.consumer.source import Partition, Record
from soma_common.errors import LeaseLost
from soma_common.inbox import LaneCount

log = logging.getLogger(__name__)


class Again(NamedTuple):
    """A record that is to be tried again in so many seconds. Later records of its sequence wait behind it."""

    record: Record
    wait: float


class Running(NamedTuple):
    """A handler that runs: when it began, by the monotonic clock, and on which of the lane's records (None: several).

    One value, because handlers may run in a thread: who looks at a lane sees both parts of the same moment.
    """

    began: float
    place: int | None

    @property
    def took(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began


class Work:
    """What the handlers of one transaction are at. A thread that was left behind goes on writing into its own."""

    __slots__ = ("running",)

    def __init__(self) -> None:
        self.running: Running | None = None


class _Held(NamedTuple):
    """The records of a sequence that waits for its next try."""

    due: float
    records: deque[Record]


class Lane:
    """What waits for one worker, in order, and the sequences that wait for their next try.

    ``count`` are its batches in the database. ``trying`` are the records of the transaction ``tx`` that runs;
    ``work`` tells which handler runs. ``overdue`` is the one that was cancelled for taking too long; ``blame`` is kept
    when it may have outlived its connection. ``given_up``: whatever runs here still, nothing more comes of it.
    """

    def __init__(self, count: LaneCount, batch: int, sequence_of: SequenceOf) -> None:
        self.count = count
        self.work = Work()
        self.trying: Sequence[Record] = ()
        self.tx: Any = None
        self.overdue: Running | None = None
        self.blame: Exception | None = None
        self.given_up = False
        self.working: Sequence[Record] = ()
        self.task: asyncio.Task[Any] | None = None
        self._batch, self._sequence_of = batch, sequence_of
        self._ready: deque[Record] = deque()
        self._held: dict[bytes, _Held] = {}
        self._wake = asyncio.Event()

    @property
    def held(self) -> int:
        """How many records wait for a next try, their followers included."""
        return sum(len(held.records) for held in self._held.values())

    def put(self, record: Record) -> None:
        """A record waits."""
        self._ready.append(record)
        self._wake.set()

    def hold(self, again: Sequence[Again], now: float) -> None:
        """Sequences wait; of each the records come in order, the first says how long."""
        for record, wait in again:
            sequence = self._sequence_of(record)
            if sequence not in self._held:
                self._held[sequence] = _Held(now + wait, deque())
            self._held[sequence].records.append(record)

    def take(self, now: float) -> list[Record]:
        """The next batch: sequences whose time has come go first, sequences that wait are left out."""
        if not self._held:
            count = min(self._batch, len(self._ready))
            return [self._ready.popleft() for _ in range(count)]
        for sequence in [sequence for sequence, held in self._held.items() if held.due <= now]:
            self._ready.extendleft(reversed(self._held.pop(sequence).records))
        batch: list[Record] = []
        while self._ready and len(batch) < self._batch:
            record = self._ready.popleft()
            held = self._held.get(self._sequence_of(record))
            if held is None:
                batch.append(record)
            else:
                held.records.append(record)
        return batch

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget what waits of these partitions."""
        self._ready = deque(record for record in self._ready if record.partition not in partitions)
        for sequence, held in list(self._held.items()):
            kept = deque(record for record in held.records if record.partition not in partitions)
            if kept:
                self._held[sequence] = held._replace(records=kept)
            else:
                del self._held[sequence]

    def give_up(self, task: asyncio.Task[Any]) -> None:
        """Cancel what runs, for good: see ``check``."""
        self.given_up = True
        task.add_done_callback(_take_note)  # nobody else asks what became of it
        task.cancel()

    def check(self) -> None:
        """Raises LeaseLost when the lane was given up: its task begins nothing more, and blames no event."""
        if self.given_up:
            raise LeaseLost("A batch was given up before it ended.")

    def subject(self, running: Running) -> Sequence[Record]:
        """What a running handler works on."""
        return self.trying if running.place is None else self.trying[running.place : running.place + 1]

    async def wait(self, now: float) -> None:
        """Until a record comes, or the time of a sequence that waits."""
        due = min((held.due for held in self._held.values()), default=None)
        if due is None:
            await self._wake.wait()
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - now)):
                    await self._wake.wait()
        self._wake.clear()


Apply = Callable[[Lane, Sequence[Record]], Awaitable[Sequence[Again]]]


class Lanes:
    """Long-lived workers, each with a lane; a sequence always goes to the same one.

    Args:
        counts: one lane for each.
        batch: most records of one transaction.
        apply: settles records and returns those to try again; an error ends all lanes, and ``run`` raises it.
    """

    def __init__(self, counts: Sequence[LaneCount], batch: int, sequence_of: SequenceOf, apply: Apply) -> None:
        self._lanes = [Lane(count, batch, sequence_of) for count in counts]
        self._sequence_of, self._apply = sequence_of, apply
        self._rested = asyncio.Event()
        self._leaving: Collection[Partition] = ()

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    @property
    def counts(self) -> list[LaneCount]:
        """How many batches each lane has committed."""
        return [lane.count for lane in self._lanes]

    def put(self, records: Iterable[Record]) -> None:
        """Records wait in the lanes of their sequences."""
        lanes, number = self._lanes, len(self._lanes)
        sequence_of, hash_of = self._sequence_of, zlib.crc32
        for record in records:
            lanes[hash_of(sequence_of(record)) % number].put(record)

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget what waits of these partitions; what is being applied goes on."""
        for lane in self._lanes:
            lane.drop(partitions)

    async def leave(self, partitions: Collection[Partition], patience: float) -> bool:
        """Forget what waits of these partitions, and let what is being applied end; whether it did in time."""
        self._leaving = partitions
        try:
            async with asyncio.timeout(patience):
                while any(record.partition in partitions for lane in self._lanes for record in lane.working):
                    self._rested.clear()
                    await self._rested.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._leaving = ()
            self.drop(partitions)

    async def run(self) -> None:
        """Work until cancelled; raises what ended a lane."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._work(lane))

    async def _work(self, lane: Lane) -> None:
        while True:
            if self._leaving:
                lane.drop(self._leaving)
            lane.working = lane.take(time.monotonic())
            if not lane.working:
                await lane.wait(time.monotonic())
                continue
            try:
                again = await self._applied(lane)
            finally:
                lane.working, lane.work, lane.task = (), Work(), None
                self._rested.set()
            lane.hold(again, time.monotonic())

    async def _applied(self, lane: Lane) -> Sequence[Again]:
        """In a task of its own: the watchdog may cancel it, and a handler that does not let itself be cancelled may be
        left behind."""
        task = lane.task = asyncio.create_task(_call(self._apply, lane))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            lane.give_up(task)
            raise
        if task.cancelled():
            raise LeaseLost("A batch was given up: its partition was given away before it ended.")
        again: Sequence[Again] = task.result()
        return again


def _take_note(task: asyncio.Task[Any]) -> None:
    """An error that nobody asked for would be logged as one that was overlooked."""
    if not task.cancelled() and task.exception() is not None:
        log.debug("What a batch came to after it was given up.", exc_info=task.exception())


async def _call(apply: Apply, lane: Lane) -> Sequence[Again]:
    return await apply(lane, lane.working)
