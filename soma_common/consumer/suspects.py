"""When owners of a partition keep dying, events are begun one by one, and the killer alone is buried."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from soma_common.consumer.positions import Positions
from soma_common.consumer.source import Partition, Place, Record
from soma_common.errors import PoisonEvent
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_SQL = blocks("consumer")


class Suspects:
    """Counts how often partitions are taken without moving; while one is suspect, this worker goes in single file.

    An owner that is killed never had more of a partition in flight than ``window`` events behind the stored position:
    the killer is one of them. Which one tells the note that is made before an event is begun alone, and taken back
    when the event ends or its owner leaves alive.

    Whoever is killed from outside may also have been at work on an event, and soon after its start it was always the
    same one. So before an event with such a note is begun again, nothing is done for a while: who dies within that
    dies of something else, and no innocent event is buried for it.

    Args:
        claims, tries, wait: see :class:`ConsumerSettings`.
        begun: what this process has begun alone and not ended, over its sessions.
        hand_out: gives a record to its lane.
        condemn: makes that the record will become a letter without being handled.
    """

    def __init__(
        self, pool: Pool, consumer_id: int, positions: Positions, *, window: int, claims: int, tries: int,
        wait: float, begun: set[Place],
        hand_out: Callable[[Sequence[Record]], None], condemn: Callable[[Record, PoisonEvent], None],
    ) -> None:  # fmt: skip
        self._pool, self._consumer_id, self._positions = pool, consumer_id, positions
        self._window, self._claims, self._tries, self._wait = window, claims, tries, wait
        self._begun, self._left = begun, dict[Place, int]()
        self._hand_out, self._condemn = hand_out, condemn
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
        columns = ([partition.name for partition in new], [partition.number for partition in new])
        taken = await self._pool.fetch(_SQL["take_partitions"], self._consumer_id, *columns)
        left = await self._pool.fetch(_SQL["attempts_left"], self._consumer_id, *columns)
        self._epochs |= new
        for name, number, claims in taken:
            partition = Partition(name, number)
            self._taken[partition] = claims
            self._careful.pop(partition, None)
            if claims > self._claims:
                self._careful[partition] = self._window
        for name, number, offset, attempts in left:  # it moved before it died, but what it died of is still there
            partition = Partition(name, number)
            self._careful[partition] = self._window
            self._left[partition, offset] = attempts - ((partition, offset) in self._begun)

    def sift(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records that may go to their lanes at once; the others wait for their turn in single file."""
        if not self._careful and not self._file:
            return records
        self._file.extend(records)
        self._more.set()
        return ()

    async def run(self) -> None:
        """Hand out what waits, one by one. Runs for ever."""
        while True:
            while self._file:
                record = self._file.popleft()
                if not self._positions.is_settled(record):
                    await self._alone(record)
                self._count_down(record.partition)
            self._more.clear()
            await self._more.wait()

    async def _alone(self, record: Record) -> None:
        place = (record.partition, record.offset)
        if deaths := self._left.pop(place, 0):
            await self._keep_still(deaths)
        if self._positions.is_settled(record):  # its partition went meanwhile
            return
        if place not in self._begun:
            await self._begin(record)
        self._hand_out((record,))
        while not self._positions.is_settled(record):
            self._settled.clear()
            with suppress(TimeoutError):  # an assignment may also end without a word
                async with asyncio.timeout(1.0):
                    await self._settled.wait()
        if place in self._begun:  # and not withdrawn
            await self._pool.fetch(_SQL["end_attempt"], self._consumer_id, *record.partition, record.offset)
            self._begun.discard(place)

    async def _keep_still(self, deaths: int) -> None:
        """The longer the more often a process died, and never in step with whoever kills it from outside."""
        self.waiting = True
        await asyncio.sleep(deaths * self._wait * random.uniform(1.0, 2.0))
        self.waiting = False

    async def _begin(self, record: Record) -> None:
        place = (self._consumer_id, *record.partition, record.offset)
        async with self._pool.transaction(synchronous=True) as tx:
            attempts = (await fetch(tx, _SQL["begin_attempt"], place))[0][0]
        self._begun.add((record.partition, record.offset))
        if attempts > self._tries:
            poison = PoisonEvent(
                f"The process ended {attempts - 1} times while it worked on this event alone.",
                cure="find what kills the process (memory, a native library, os._exit), then re-drive the letter.",
            )
            self._condemn(record, poison)

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
        await self._reset(tx, [(record.partition, record.offset) for record in records])

    def were_saved(self, records: Sequence[Record]) -> None:
        """That transaction has committed."""
        for record in records:
            self._taken[record.partition] = 0

    async def leave(self, tx: object, partitions: Sequence[Partition]) -> None:
        """In good order: the next owner need not suspect them."""
        taken = [(partition, -1) for partition in partitions if self._taken.pop(partition, 0)]
        if taken:
            await self._reset(tx, taken)
        for partition, offset in [place for place in self._begun if place[0] in partitions]:
            await fetch(tx, _SQL["withdraw_attempt"], (self._consumer_id, *partition, offset))
            self._begun.discard((partition, offset))

    async def _reset(self, tx: object, moves: Sequence[tuple[Partition, int]]) -> None:
        columns = (
            [partition.name for partition, _ in moves],
            [partition.number for partition, _ in moves],
            [offset for _, offset in moves],
        )
        await fetch(tx, _SQL["partitions_moved"], (self._consumer_id, *columns))

    def forget(self, partitions: Sequence[Partition]) -> None:
        """They are not ours any more."""
        for partition in partitions:
            self._epochs.pop(partition, None)
            self._taken.pop(partition, None)
            self._careful.pop(partition, None)
        self._left = {place: deaths for place, deaths in self._left.items() if place[0] not in partitions}
