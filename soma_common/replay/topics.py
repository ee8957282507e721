"""What a replay reads from Kafka: partition after partition, up to where the consumer stood when it was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from soma_common.consumer.source import Partition, Record, made_record
from soma_common.dlq.models import RawRecord
from soma_common.errors import ReplayRefused
from soma_common.events.models import RecordedEvent
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import Pool
from soma_common.replay.models import Offset, Progress, ReplayFilter
from soma_common.replay.past import known
from soma_common.replay.reading import Page
from soma_common.sql.loader import blocks

Told = Callable[[int, int], None]
_PAGE = 2000


class Topics(Protocol):
    """Reads topics beside all consumers."""

    async def ranges(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """The first offset of each partition that is still there, and the one behind the last."""

    async def ids(self, names: Collection[str]) -> Mapping[str, UUID]:
        """The ids of topics, as far as the broker tells them."""

    async def read(
        self, partition: Partition, offset: int, end: int, limit: int, *, wait: float | None = None
    ) -> tuple[list[Record], int]:
        """The next records before ``end``, and the offset behind them; maybe none yet."""

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept."""

    async def close(self) -> None:
        """Disconnect; safe to call twice."""


class Stretch:
    """The offsets of a partition that a replay covers: from ``first`` to before ``end``; ``next`` is where it is."""

    __slots__ = ("end", "first", "next", "partition")

    def __init__(self, partition: Partition, first: int, next_: int, end: int) -> None:
        self.partition, self.first, self.next, self.end = partition, first, next_, end


class TopicPages:
    """Pages of the events of one run. Undecodable records come as they are; those of other filters are left out."""

    def __init__(self, pool: Pool, topics: Topics, run: Progress) -> None:
        self._pool, self._topics, self._run = pool, topics, run
        self._stretches: Sequence[Stretch] | None = None

    async def next(self, cursor: Cursor | Offset, limit: int) -> Page | None:
        """The next events, at most ``limit``; None at the end. ``cursor`` only says that a page before is done.

        Raises:
            ReplayRefused: the topic has lost what comes next.
            InfrastructureError: the broker or the registry is away.
        """
        if self._stretches is None:
            await self._open()
            assert self._stretches is not None
        for stretch in self._stretches:
            if stretch.next < stretch.end:
                return await self._page(stretch, limit)
        return None

    async def _open(self) -> None:
        number = self._run.scope.consumer_id
        await check_same(self._pool, self._topics, number)
        rows = await self._pool.fetch(blocks("replays")["offsets"], self._run.run_id)
        self._stretches = [Stretch(Partition(row[0], row[1]), *row[2:]) for row in rows]
        stored = {Partition(*row[:2]): row[2] for row in await self._pool.fetch(blocks("consumer")["offsets"], number)}
        for stretch in self._stretches:
            if stored.get(stretch.partition, 0) < stretch.end:
                raise set_back(stretch.partition, stored.get(stretch.partition, 0), stretch.end)

    async def close(self) -> None:
        """Nothing is read ahead: aiokafka does that."""

    async def _page(self, stretch: Stretch, limit: int) -> Page:
        read, following = await self._topics.read(stretch.partition, stretch.next, stretch.end, limit)
        assert self._stretches is not None
        before = sum(other.next - other.first for other in self._stretches) - stretch.next
        stretch.next = following
        place = _Place(stretch.partition, before)
        records = [
            made_record((*record[:3], place, *record[4:]))
            for record in read
            if record.event is None or self._run.wanted.matches(record.event)
        ]
        return Page(records, place.at(following))


class _Place(NamedTuple):
    """Where in Kafka a page was read; so many offsets of other partitions lie before its own."""

    partition: Partition
    before: int

    def at(self, offset: int) -> Offset:
        """The cursor that goes on with an offset."""
        return Offset(*self.partition, offset, self.before + offset)

    def after(self, offset: int) -> Offset:
        """The cursor once an offset is done."""
        return self.at(offset + 1)


async def stretches(pool: Pool, topics: Topics, consumer_id: int) -> list[Stretch]:
    """What a consumer has settled in Kafka and Kafka still has.

    Raises:
        ReplayRefused: the consumer has no position in Kafka, or stands where its topic is not (any more).
        BrokerUnavailable: no broker answers.
    """
    rows = await pool.fetch(blocks("consumer")["offsets"], consumer_id)
    stored = {Partition(row[0], row[1]): row[2] for row in rows}
    if not stored:
        raise ReplayRefused("This consumer has no position in Kafka.", cure="replay it from the log, or run it first.")
    ranges = await topics.ranges(stored)
    await check_same(pool, topics, consumer_id)
    for partition, (first, end) in ranges.items():
        if not first <= stored[partition] <= end:
            raise ReplayRefused(
                f"The consumer stands at {stored[partition]} of {partition}, and that has {first} to {end}.",
                cure="was the topic made anew, or its retention shorter than the consumer's pause? Mend that first.",
            )
    return [Stretch(p, ranges[p][0], ranges[p][0], stored[p]) for p in sorted(stored)]


def set_back(partition: Partition, stored: int, covered: int) -> ReplayRefused:
    """The refusal of a run that would be ahead of its consumer."""
    return ReplayRefused(
        f"The consumer went back to {stored} of {partition}, and this run covers {covered}: was the topic made anew?",
        cure="cancel this run; a new one covers what the consumer has read.",
    )


async def check_same(pool: Pool, topics: Topics, consumer_id: int) -> None:
    """That topics are still those that the consumer has read.

    Raises:
        ReplayRefused: one was deleted and made anew; at the stored offsets there are other records now, or none yet.
        BrokerUnavailable: no broker answers.
    """
    read = {row[0]: row[1] for row in await pool.fetch(blocks("replays")["topic_ids"], consumer_id)}
    ids = await topics.ids(read) if read else {}
    anew = sorted(name for name, known_id in read.items() if name in ids and ids[name].int != known_id.int)
    if anew:
        raise ReplayRefused(
            f"{', '.join(anew)} was deleted and made anew: what the consumer has read is gone.",
            cure="see to the live consumer first, which stands still there; then begin a new replay.",
        )


class Scan:
    """Counts of the events in Kafka that a filter finds, by (type, service, day); every record has to be read."""

    def __init__(self, pool: Pool, topics: Topics, consumer_id: int) -> None:
        self._pool, self._topics, self._consumer_id = pool, topics, consumer_id

    async def rows(self, wanted: ReplayFilter, covered: Sequence[Stretch], told: Told | None) -> list[tuple[Any, ...]]:
        """(type, service, day, how many, how many of them the inbox knows).

        Args:
            told: is called with how many offsets were passed, of how many.
        """
        total, passed = sum(s.end - s.first for s in covered), 0
        counts, familiar = Counter[Any](), Counter[Any]()
        for stretch in covered:
            while stretch.next < stretch.end:
                before = stretch.next
                read, stretch.next = await self._topics.read(stretch.partition, before, stretch.end, _PAGE)
                events = [r.event for r in read if r.event is not None and wanted.matches(r.event)]
                ids = await self._known(events)
                counts.update(map(_kind, events))
                familiar.update(_kind(event) for event in events if event.event_id in ids)
                passed += stretch.next - before
                if told is not None:
                    told(passed, total)
        return [(*kind, count, familiar[kind]) for kind, count in counts.items()]

    async def _known(self, events: Sequence[RecordedEvent]) -> frozenset[UUID]:
        async with self._pool.connection() as connection:
            return await known(connection, self._consumer_id, events)


def _kind(event: RecordedEvent) -> tuple[Any, ...]:
    return event.event_type, event.service_id, event.timestamp.astimezone(UTC).date()
