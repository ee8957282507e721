"""When owners of a partition keep dying, their suspects are begun one by one, and the killer alone is buried."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from typing import Final

from soma_common.consumer.attempts import Attempts
from soma_common.consumer.positions import Positions
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Place, Record
from soma_common.errors import PoisonEvent

_TOGETHER: Final = 50  # events


class Suspects:
    """Counts how often partitions are taken without moving; while one is suspect, this worker goes in single file.

    An owner that is killed never had more of a partition in flight than ``settings.ahead`` events behind the stored
    position: the killer is one of them. Which one tell the notes that are made before events are begun, and taken back
    when they end or their owner leaves alive. At first some are begun together; with which of them somebody died, those
    are begun alone.

    Whoever is killed from outside may also have been at work on an event, and soon after its start it was always the
    same one. So before an event with which somebody died alone is begun again, nothing is done for a while: who dies
    within that dies of something else, and no innocent event is buried for it.

    Args:
        hand_out: gives records to their lanes.
        condemn: makes that the record will become a letter without being handled.
    """

    def __init__(
        self, attempts: Attempts, positions: Positions, settings: ConsumerSettings, *,
        hand_out: Callable[[Sequence[Record]], None], condemn: Callable[[Record, PoisonEvent], None],
    ) -> None:  # fmt: skip
        self._attempts, self._positions, self._settings = attempts, positions, settings
        self._hand_out, self._condemn = hand_out, condemn
        self._left: dict[Place, int] = {}
        self._epochs: dict[Partition, int] = {}
        self._taken: dict[Partition, int] = {}
        self._careful: dict[Partition, int] = {}
        self._file: deque[Record] = deque()
        self._more, self._settled = asyncio.Event(), asyncio.Event()
        self.waiting = False

    @property
    def partitions(self) -> frozenset[Partition]:
        """The partitions that are read in single file."""
        return frozenset(self._careful)

    async def look(self, records: Sequence[Record]) -> None:
        """Count partitions that are seen under a new epoch."""
        new = {r.partition: r.epoch for r in records if self._epochs.get(r.partition) != r.epoch}
        if not new:
            return
        taken, left = await self._attempts.take(new), await self._attempts.left(new)
        self._epochs |= new
        self._taken |= taken
        # It may have moved before its owner died, but what that died of is still there.
        found = {partition for partition, _ in left}
        for partition, claims in taken.items():
            self._careful.pop(partition, None)
            if claims > self._settings.poison_claims or partition in found:
                self._careful[partition] = self._settings.ahead
        self._left |= left

    def sift(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records that may go to their lanes at once; the others wait for their turn in single file."""
        if not self._careful and not self._file:
            return records
        self._file.extend(records)
        self._more.set()
        return ()

    async def run(self) -> None:
        """Hand out what waits. Runs for ever."""
        while True:
            while self._file:
                records = self._first()
                if records[0].place in self._left:
                    await self._alone(records[0])
                else:
                    await self._together(records)
                for record in records:  # only now: what comes meanwhile must not overtake them
                    self._file.popleft()
                    self._count_down(record.partition)
            self._more.clear()
            await self._more.wait()

    def _first(self) -> list[Record]:
        """The first that wait: an event with which somebody died, or some with which nobody did."""
        if self._file[0].place in self._left:
            return [self._file[0]]
        innocent = takewhile(lambda record: record.place not in self._left, self._file)
        return list(islice(innocent, _TOGETHER))

    async def _together(self, records: Sequence[Record]) -> None:
        if records := self._unsettled(records):
            await self._attempts.begin([record.place for record in records])
            await self._to_their_end(records)

    async def _alone(self, record: Record) -> None:
        if self._positions.is_settled(record):  # of an assignment that is over
            return
        place = record.place
        if deaths := self._left.pop(place):
            await self._keep_still(deaths)
            if self._positions.is_settled(record):  # its partition went meanwhile
                return
        attempts = await self._attempts.begin_alone(place)
        if attempts > self._settings.poison_tries:
            poison = PoisonEvent(
                f"The process ended {attempts - 1} times while it worked on this event alone.",
                cure="find what kills the process (memory, a native library, os._exit), then re-drive the letter.",
            )
            self._condemn(record, poison)
        await self._to_their_end([record])

    async def _to_their_end(self, records: Sequence[Record]) -> None:
        self._hand_out(self._unsettled(records))  # their partition may have gone while they were noted
        while self._unsettled(records):
            self._settled.clear()
            with suppress(TimeoutError):  # an assignment may also end without a word
                async with asyncio.timeout(1.0):
                    await self._settled.wait()
        await self._attempts.end([record.place for record in records])

    def _unsettled(self, records: Sequence[Record]) -> list[Record]:
        return [record for record in records if not self._positions.is_settled(record)]

    async def _keep_still(self, deaths: int) -> None:
        """The longer the more often a process died, and never in step with whoever kills it from outside."""
        self.waiting = True
        await asyncio.sleep(deaths * self._settings.poison_wait * random.uniform(1.0, 2.0))
        self.waiting = False

    def settled(self) -> None:
        """Something was settled."""
        self._settled.set()

    def _count_down(self, partition: Partition) -> None:
        left = self._careful.get(partition)
        if left is None:
            return
        self._careful[partition] = left - 1
        if left <= 1 and all(record.partition != partition for record in self._file):
            del self._careful[partition]

    def moved(self, records: Sequence[Record]) -> Sequence[Record]:
        """Of these records, those in whose partition a former owner left without moving."""
        return [record for record in records if self._taken.get(record.partition)]

    async def save_moved(self, tx: object, records: Sequence[Record]) -> None:
        """In the transaction that moves the positions: the count begins anew."""
        await self._attempts.moved(tx, [record.place for record in records])

    def were_saved(self, records: Sequence[Record]) -> None:
        """That transaction has committed."""
        for record in records:
            self._taken[record.partition] = 0

    async def leave(self, tx: object, partitions: Sequence[Partition]) -> None:
        """In good order: the next owner need not suspect them."""
        taken = [(partition, -1) for partition in partitions if self._taken.pop(partition, 0)]
        if taken:
            await self._attempts.moved(tx, taken)
        await self._attempts.withdraw(tx, partitions)

    def forget(self, partitions: Sequence[Partition]) -> None:
        """They are not ours any more."""
        for partition in partitions:
            self._epochs.pop(partition, None)
            self._taken.pop(partition, None)
            self._careful.pop(partition, None)
        self._left = {place: deaths for place, deaths in self._left.items() if place[0] not in partitions}
