"""Topics behind a live consumer of Kafka, as a rebuild reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from soma_common.consumer.source import Partition
from soma_common.dlq.models import RawRecord
from soma_common.errors import ReplayRefused
from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.replay.models import Offset, Progress
from soma_common.replay.past import Rest, TooMuch
from soma_common.replay.reading import Page
from soma_common.replay.topics import Stretch, Topics, check_same, set_back
from soma_common.sql.loader import blocks

_BRIEFLY = 0.02  # seconds of a fetch while the live consumer stands still


class TopicPast:
    """The topics up to the consumer's stored offsets, and, while it stands still, up to their ends.

    The order is that of each partition. Partitions that were added while it runs are read from their beginning.
    """

    def __init__(self, pool: Pool, topics: Topics, run: Progress) -> None:
        self._pool, self._topics, self._run = pool, topics, run
        self._stretches: dict[Partition, Stretch] = {}

    async def next(self, limit: int) -> Page | None:
        """The next records, at most ``limit``; None when there are no more behind the live consumer just now.

        Raises:
            ReplayRefused: the topic has lost what comes next.
            InfrastructureError: the broker or the registry is away.
        """
        if not any(stretch.next < stretch.end for stretch in self._stretches.values()):
            await self._look()
        # The one that is most behind first, so that all come near to the live consumer.
        stretch = max(self._stretches.values(), key=lambda stretch: stretch.end - stretch.next)
        if stretch.next >= stretch.end:
            return None
        before = sum(other.next - other.first for other in self._stretches.values()) - stretch.next
        read, stretch.next = await self._topics.read(stretch.partition, stretch.next, stretch.end, limit)
        return Page(read, Offset(*stretch.partition, stretch.next, before + stretch.next))

    async def _look(self) -> None:
        """How far the live consumer is now."""
        if not self._stretches:
            await check_same(self._pool, self._topics, self._run.scope.consumer_id)
            rows = await self._pool.fetch(blocks("replays")["offsets"], self._run.run_id)
            made = (Stretch(Partition(row[0], row[1]), *row[2:]) for row in rows)
            self._stretches = {stretch.partition: stretch for stretch in made}
        for partition, stored in _stored(await self._rows()).items():
            if partition not in self._stretches:
                await self._add(partition)
            if stored < self._stretches[partition].next:
                raise set_back(partition, stored, self._stretches[partition].next)
            self._stretches[partition].end = stored

    async def _rows(self, tx: Any | None = None) -> Sequence[Row]:
        sql, number = blocks("consumer")["offsets"], self._run.scope.consumer_id
        return await self._pool.fetch(sql, number) if tx is None else await fetch(tx, sql, (number,))

    async def _add(self, partition: Partition) -> None:
        first = (await self._topics.ranges([partition]))[partition][0]
        check_beginning(partition, first)
        args = (self._run.run_id, [partition.name], [partition.number], [first], [first])
        await self._pool.fetch(blocks("replays")["open_offsets"], *args)
        self._stretches[partition] = Stretch(partition, first, first, first)

    async def behind(self) -> int:
        """How many offsets lie between the pages and the ends of the topics.

        Raises:
            ReplayRefused: a topic is not the one any more that the consumer has read.
        """
        await check_same(self._pool, self._topics, self._run.scope.consumer_id)
        ranges = await self._topics.ranges(self._stretches)
        return sum(end - self._stretches[partition].next for partition, (_, end) in ranges.items())

    async def rest(self, tx: Any, most: int) -> list[Rest]:
        """What lies behind the pages and could be settled, while no batch of the consumer is in flight.

        The consumer reads committed records only, so what it has settled lies before the ends that Kafka names now.

        Raises:
            TooMuch: it is more than ``most``, or of a partition that no page has come to.
        """
        stored = _stored(await self._rows(tx))
        if set(stored) - set(self._stretches):
            raise TooMuch
        found: list[Rest] = []
        for partition, (_, end) in (await self._topics.ranges(stored)).items():
            place = self._stretches[partition].next
            while place < end:
                read, place = await self._topics.read(partition, place, end, most, wait=_BRIEFLY)
                found += [Rest(record, record.offset < stored[partition]) for record in read]
                if len(found) > most:
                    raise TooMuch
        return found

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept."""
        return await self._topics.decode(raw)


def check_beginning(partition: Partition, first: int) -> None:
    """That nothing of a partition is gone.

    Raises:
        ReplayRefused: its first records are.
    """
    if first > 0:
        raise ReplayRefused(
            f"{partition} begins at offset {first}: what was before is gone, and new tables would lack its effects.",
            cure="rebuild from topics that keep everything, or give the projection a consumer of the log.",
        )


def _stored(rows: Sequence[Row]) -> Mapping[Partition, int]:
    return {Partition(row[0], row[1]): row[2] for row in rows}
