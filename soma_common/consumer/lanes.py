"""Keys spread over lanes: in order within a key, several keys at once."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from soma_common.consumer.source import Partition, Record


class Again(NamedTuple):
    """A record that is to be tried again in so many seconds. Later records of its key wait behind it."""

    record: Record
    delay: float


Apply = Callable[[Sequence[Record]], Awaitable[Sequence[Again]]]


class _Held(NamedTuple):
    """The records of a key that waits for its next try."""

    due: float
    records: deque[Record]


class Lane:
    """What waits for one worker, in order, and the keys that wait for their next try."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._ready: deque[Record] = deque()
        self._held: dict[bytes, _Held] = {}
        self._wake = asyncio.Event()
        self.working: Sequence[Record] = ()

    def put(self, record: Record) -> None:
        """A record waits."""
        self._ready.append(record)
        self._wake.set()

    def hold(self, again: Sequence[Again], now: float) -> None:
        """Keys wait; of each key the records come in order, the first says how long."""
        for record, delay in again:
            key = order_key(record)
            if key not in self._held:
                self._held[key] = _Held(now + delay, deque())
            self._held[key].records.append(record)

    def take(self, now: float) -> list[Record]:
        """The next batch: keys whose time has come go first, keys that wait are left out."""
        for key in [key for key, held in self._held.items() if held.due <= now]:
            self._ready.extendleft(reversed(self._held.pop(key).records))
        batch: list[Record] = []
        while self._ready and len(batch) < self._batch:
            record = self._ready.popleft()
            held = self._held.get(order_key(record)) if self._held else None
            if held is None:
                batch.append(record)
            else:
                held.records.append(record)
        return batch

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget what waits of these partitions."""
        self._ready = deque(record for record in self._ready if record.partition not in partitions)
        for key, held in list(self._held.items()):
            kept = deque(record for record in held.records if record.partition not in partitions)
            if kept:
                self._held[key] = held._replace(records=kept)
            else:
                del self._held[key]

    async def wait(self, now: float) -> None:
        """Until a record comes, or the time of a key that waits."""
        due = min((held.due for held in self._held.values()), default=None)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), None if due is None else max(0.0, due - now))
        self._wake.clear()


class Gate:
    """How many lanes may work at once: halved when they are in each other's way, raised again while they are not."""

    def __init__(self, most: int, patience: int = 100) -> None:
        self._most, self._patience = most, patience
        self.limit = most
        self._inside, self._smooth = 0, 0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._inside < self.limit)
            self._inside += 1

    async def __aexit__(self, *exc: object) -> None:
        async with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def conflict(self) -> None:
        """Two transactions met."""
        self.limit, self._smooth = max(1, self.limit // 2), 0

    def success(self) -> None:
        """A transaction met nobody."""
        self._smooth += 1
        if self._smooth >= self._patience and self.limit < self._most:
            self.limit, self._smooth = self.limit + 1, 0


class Lanes:
    """Long-lived workers, each with a lane; a key always goes to the same one.

    Args:
        count: lanes, so most transactions at once.
        batch: most records of one transaction.
        apply: settles records and returns those to try again; an error ends all lanes, and ``run`` raises it.
        clock: seconds, never going back.
    """

    def __init__(self, count: int, batch: int, apply: Apply, clock: Callable[[], float]) -> None:
        self._lanes = [Lane(batch) for _ in range(count)]
        self._apply, self._clock = apply, clock
        self._rested = asyncio.Event()

    def put(self, records: Iterable[Record]) -> None:
        """Records wait in the lanes of their keys."""
        for record in records:
            self._lanes[zlib.crc32(order_key(record)) % len(self._lanes)].put(record)

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget what waits of these partitions; what is being applied goes on."""
        for lane in self._lanes:
            lane.drop(partitions)

    async def rest(self, partitions: Collection[Partition]) -> None:
        """Until nothing of these partitions is being applied."""
        while any(record.partition in partitions for lane in self._lanes for record in lane.working):
            self._rested.clear()
            await self._rested.wait()

    async def run(self) -> None:
        """Work until cancelled; raises what ended a lane."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._work(lane))

    async def _work(self, lane: Lane) -> None:
        while True:
            lane.working = lane.take(self._clock())
            if not lane.working:
                await lane.wait(self._clock())
                continue
            try:
                again = await self._apply(lane.working)
            finally:
                lane.working = ()
                self._rested.set()
            lane.hold(again, self._clock())


def order_key(record: Record) -> bytes:
    """What stays in order with this record: its key's bytes, or its partition where it has none."""
    return record.key if record.key is not None else str(record.partition).encode()
