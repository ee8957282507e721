"""Kafka as a source: aiokafka's group membership and fetching; positions belong to PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from soma_common.ahead import Ahead, strides
from soma_common.consumer.source import Drain, Partition, Record
from soma_common.dlq.models import RawRecord
from soma_common.errors import LeaseLost, OffsetLost
from soma_common.events.codec import Codec
from soma_common.events.models import RecordedEvent
from soma_common.kafka.bounded import bounded
from soma_common.kafka.clients import unreachable
from soma_common.kafka.member import Listener, SourceSettings, close_member, new_member
from soma_common.kafka.records import Decoder, raw_record
from soma_common.kafka.topic_ids import topic_ids
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks
from soma_common.tasks import end

log = logging.getLogger(__name__)

_BRIEFLY = 0.02  # seconds of a fetch while a full partition may have room again
_MOVING = 0.02  # seconds between two looks whether a rebalance has ended


@dataclass(slots=True)
class _Owned:
    """A partition under one epoch; ``stored`` is the next offset in PostgreSQL, ``topic_id`` the topic it is of."""

    epoch: int
    stored: int
    topic_id: UUID | None

    def is_of_another(self, topic: str, ids: Mapping[str, UUID]) -> bool:
        """Whether the topic of this name, as far as the brokers said, is not the one that was read."""
        return ids.get(topic, self.topic_id) != self.topic_id


class KafkaSource:
    """Reads topics as a member of a consumer group. Keeps ``Source``'s promises.

    Whenever the group hands out partitions anew, their epoch in PostgreSQL rises and reading begins at the stored
    offset. What Kafka remembers of offsets is never read.
    """

    def __init__(self, pool: Pool, settings: SourceSettings, codec: Codec) -> None:
        self.settings = settings
        self._pool = pool
        self._decoder = Decoder(codec)
        self._consumer: AIOKafkaConsumer | None = None
        self._consumer_id = 0
        self._drain: Drain | None = None
        self._owned: dict[Partition, _Owned] = {}
        self._halted: set[Partition] = set()
        self._lost: list[Record] = []
        self._generation, self._claimed, self._moving = 0, -1, False
        self._commits: dict[Partition, int] = {}
        self._committing: asyncio.Task[None] | None = None
        self._ahead: Ahead[list[Record]] = Ahead()
        self._heard = 0.0

    def check_drain(self, seconds: float) -> None:
        """The group waits for so long, or ConfigurationError."""
        self.settings.check_drain(seconds)

    async def start(self, consumer_id: int, drain: Drain) -> None:
        """Join the group.

        Raises:
            BrokerUnavailable: no broker answers.
        """
        self._consumer_id, self._drain = consumer_id, drain
        if self._consumer is not None:
            return
        consumer = new_member(self.settings)
        consumer.subscribe(topics=list(self.settings.topics), listener=Listener(self.revoked, self.handed_out))
        try:
            await consumer.start()
        except (KafkaError, OSError) as error:
            await close_member(consumer)
            raise unreachable(self.settings.bootstrap, error) from error
        self._consumer = consumer
        self._committing = asyncio.create_task(self._keep_committing(), name=f"{self.settings.group} offsets")

    async def fetch(self, most: int, without: Collection[Partition] = ()) -> Sequence[Record]:
        """The next records; claims newly assigned partitions first."""
        assert self._consumer is not None, "start() comes first"
        try:
            if self._moving:  # what we hold may be another member's by now: claiming would disturb it
                await self._stay(self._consumer, _MOVING)
                return []
            if self._claimed != self._generation:
                await self._claim(self._consumer)
            lost, self._lost = self._lost, []
            return lost or await self._records(self._consumer, most, without)
        except (KafkaError, OSError, TimeoutError) as error:
            raise unreachable(self.settings.bootstrap, error) from error

    async def stay(self, seconds: float) -> None:
        """Wait with every partition full, and remain a member of the group."""
        assert self._consumer is not None, "start() comes first"
        try:
            await self._stay(self._consumer, seconds)
        except (KafkaError, OSError, TimeoutError) as error:
            raise unreachable(self.settings.bootstrap, error) from error

    async def _records(self, consumer: AIOKafkaConsumer, most: int, without: Collection[Partition]) -> list[Record]:
        wanted = [TopicPartition(*p) for p in self._owned if p not in self._halted and p not in without]
        if not wanted:  # getmany() without partitions would mean all of them
            await self._stay(consumer, self.settings.wait)
            return []
        if not self._ahead:
            self._ahead.begin(self._read(consumer, wanted, most, _BRIEFLY if without else self.settings.wait))
        generation, read = self._generation, await self._read_ahead()
        if generation != self._generation:
            return []  # the group moved meanwhile: these partitions are claimed anew, and read again
        records = [record for record in read if record.partition not in self._halted]
        if not records:
            await self._probe(consumer)
            return []
        self._heard = time.monotonic()
        if len(read) >= most:  # there is more already: read it while these are applied
            self._ahead.begin(self._read(consumer, wanted, most, self.settings.wait))
        return records

    async def _stay(self, consumer: AIOKafkaConsumer, seconds: float) -> None:
        """Wait, as one who reads.

        aiokafka takes a member out of the group that asks for no records for five minutes, and joins again only once it
        asks; errors of the group it tells nobody else, and does nothing more before it has told them.
        """
        try:
            consumer._coordinator.check_errors()
        except KafkaError:
            await self._leave()
            raise
        with consumer._subscription.fetch_context():
            await asyncio.sleep(seconds)
        await self._probe(consumer)

    async def _read_ahead(self) -> list[Record]:
        try:
            return await self._ahead.take()
        except KafkaError:
            await self._leave()  # the group refused us, or aiokafka gave up: join anew
            raise

    async def _read(self, consumer: AIOKafkaConsumer, wanted: list[Any], most: int, wait: float) -> list[Record]:
        """The next records of these partitions, decoded; none once the group has moved."""
        generation, fetched = self._generation, await self._poll(consumer, wanted, most, wait)
        records: list[Record] = []
        for tp, raws in fetched.items():
            partition = Partition(*tp)
            async for some in strides(raws):
                if generation != self._generation:
                    return []
                records += await self._decoder.records(partition, self._owned[partition].epoch, some)
        return records

    async def _poll(
        self, consumer: AIOKafkaConsumer, wanted: list[Any], most: int, wait: float
    ) -> dict[Any, list[Any]]:
        try:
            # getmany waits for the end of a rebalance without a bound of its own.
            polling = consumer.getmany(*wanted, timeout_ms=int(wait * 1000), max_records=most)
            fetched: dict[Any, list[Any]] = await bounded(polling, wait + 1.0)
            return fetched
        except TimeoutError:
            return {}
        except NoOffsetForPartitionError:
            return {}  # what aiokafka thought before we told it where to read
        except OffsetOutOfRangeError as error:
            self._note_lost(error.args[0])
            return {}

    def _note_lost(self, offsets: dict[Any, int]) -> None:
        for tp, offset in offsets.items():
            partition = Partition(*tp)
            if partition in self._owned:
                self._lost.append(_lost(partition, self._owned[partition], f"offset {offset} is out of range"))

    async def _claim(self, consumer: AIOKafkaConsumer) -> None:
        """Begin a new epoch of every assigned partition and read on where PostgreSQL says."""
        await self._ahead.forget()
        generation, assigned = self._generation, sorted(consumer.assignment())
        if not assigned:
            await self._probe(consumer)
            self._claimed = generation
            return
        earliest, ends = await self._ranges(consumer, assigned)
        ids = await self._ids(consumer)
        if generation != self._generation:
            return
        columns = tuple(zip(*((*tp, earliest[tp], ids.get(tp.topic)) for tp in assigned), strict=True))
        rows = await self._pool.fetch(blocks("consumer")["claim_offsets"], self._consumer_id, *map(list, columns))
        if generation != self._generation:
            return
        self._owned, self._lost = {}, []
        for topic, number, stored, epoch, known in rows:
            tp, partition = TopicPartition(topic, number), Partition(topic, number)
            owned = self._owned[partition] = _Owned(epoch, stored, known)
            if partition in self._halted:
                continue
            consumer.seek(tp, stored)
            why = f"it stands at {stored}, the topic has {earliest[tp]} to {ends[tp]}"
            if owned.is_of_another(topic, ids):
                self._lost.append(_lost(partition, owned, f"{why}, and is another one: it was deleted and made anew"))
            elif not earliest[tp] <= stored <= ends[tp]:
                self._lost.append(_lost(partition, owned, why))
        self._claimed, self._heard = generation, time.monotonic()

    async def _ranges(self, consumer: AIOKafkaConsumer, assigned: list[Any]) -> tuple[dict[Any, int], dict[Any, int]]:
        earliest = await bounded(consumer.beginning_offsets(assigned), self.settings.probe_every)
        ends = await bounded(consumer.end_offsets(assigned), self.settings.probe_every)
        return earliest, ends

    async def _ids(self, consumer: AIOKafkaConsumer) -> Mapping[str, UUID]:
        topics = {tp.topic for tp in consumer.assignment()}
        return await bounded(topic_ids(consumer._client, topics), self.settings.probe_every)

    async def _look_for_new_topics(self) -> None:
        """A topic that was deleted and made anew holds other records at our offsets: claiming finds that out."""
        if self._consumer is None:
            return
        with suppress(KafkaError, OSError, TimeoutError):
            ids = await self._ids(self._consumer)
            if any(owned.is_of_another(p.name, ids) for p, owned in self._owned.items() if p not in self._halted):
                await self.rewind()

    async def _probe(self, consumer: AIOKafkaConsumer) -> None:
        """While nothing comes, make sure now and then that there is a broker: aiokafka does not tell."""
        if time.monotonic() - self._heard > self.settings.probe_every:
            await bounded(consumer.topics(), self.settings.probe_every)
            self._heard = time.monotonic()

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        """Move the next offsets; LeaseLost when a partition has another epoch or its offset was set back."""
        last = {record.partition: record for record in records}
        moves = [(record, self._owned.get(partition)) for partition, record in last.items()]
        lost = {record.partition for record, owned in moves if owned is None or owned.epoch != record.epoch}
        if not lost:
            columns = zip(*((*r.partition, r.epoch, o.stored, r.after) for r, o in moves if o is not None), strict=True)
            arguments = (self._consumer_id, *map(list, columns))
            rows = await fetch(tx, blocks("consumer")["save_offsets"], arguments)
            lost = set(last) - {Partition(row[0], row[1]) for row in rows}
        if lost:
            names = ", ".join(map(str, sorted(lost)))
            raise LeaseLost(f"{names} went to another member of {self.settings.group}, or the database was set back.")

    async def saved(self, records: Sequence[Record]) -> None:
        """Remember what is stored; Kafka is told within ``commit_every``."""
        for partition, record in {record.partition: record for record in records}.items():
            owned = self._owned.get(partition)
            if owned is not None and owned.epoch == record.epoch:
                owned.stored = self._commits[partition] = record.after

    async def _keep_committing(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(self.settings.commit_every)
            await self._commit()
            if time.monotonic() - looked > self.settings.metadata_age:
                await self._look_for_new_topics()
                looked = time.monotonic()

    async def _commit(self) -> None:
        """Tell Kafka the offsets. A failure matters to nobody but lag tools, and the next commit mends it."""
        offsets, self._commits = self._commits, {}
        known = {TopicPartition(*p): offset for p, offset in offsets.items() if p in self._owned}
        if self._consumer is None or not known:
            return
        try:
            await bounded(self._consumer.commit(known), self.settings.probe_every)
        except (KafkaError, OSError, TimeoutError) as error:
            log.debug("%s: the offsets were not committed to Kafka: %s", self.settings.group, error)

    async def rewind(self) -> None:
        """Begin again at the stored offsets: the next fetch claims every partition under a new epoch."""
        self._claimed = -1

    def delivers(self, record: Record) -> bool:
        """Whether the partition is ours under the record's epoch."""
        owned = self._owned.get(record.partition)
        return owned is not None and owned.epoch == record.epoch and not self._moving

    def lag(self) -> Mapping[Partition, int]:
        """Offsets between the stored position of each partition and its end as the last fetch saw it."""
        consumer = self._consumer
        if consumer is None:
            return {}
        ends = {partition: consumer.highwater(TopicPartition(*partition)) for partition in self._owned}
        return {p: max(0, end - self._owned[p].stored) for p, end in ends.items() if end is not None}

    def raw(self, record: Record) -> RawRecord:
        """The record as Kafka has it."""
        return raw_record(record.partition, record.raw)

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept.

        Raises:
            CodecError: there is none in it.
            InfrastructureError: its schema is unknown and the registry does not answer.
        """
        return await self._decoder.event(raw)

    def halt(self, partition: Partition) -> None:
        """Fetch nothing more of it until the group hands it out again."""
        self._halted.add(partition)
        tp = TopicPartition(*partition)
        if self._consumer is not None and tp in self._consumer.assignment():
            self._consumer.pause(tp)

    @property
    def assigned(self) -> frozenset[Partition]:
        """The partitions the group gave to this member."""
        return frozenset(self._owned)

    @property
    def halted(self) -> frozenset[Partition]:
        """Those of them that were halted."""
        return frozenset(self._halted)

    async def revoked(self) -> None:
        """The group takes all partitions: finish or abandon what is in flight."""
        self._generation, self._moving = self._generation + 1, True
        if self._drain is not None:
            await self._drain(frozenset(self._owned))
        await self._commit()
        self._forget()

    def handed_out(self) -> None:
        """The group gave partitions: the next fetch claims them."""
        self._generation, self._moving = self._generation + 1, False
        self._forget()

    def _forget(self) -> None:
        self._owned.clear()
        self._halted.clear()
        self._commits.clear()
        self._lost.clear()

    async def stop(self) -> None:
        """Tell Kafka the offsets and leave the group."""
        await self._commit()
        await self._leave()

    async def _leave(self) -> None:
        """Close the client; the next ``start`` makes a new one."""
        consumer, self._consumer = self._consumer, None
        committing, self._committing = self._committing, None
        if committing is not None:
            await end(committing)
        self._generation, self._moving = self._generation + 1, False
        self._forget()
        await self._ahead.forget()
        if consumer is not None:
            await close_member(consumer)


def _lost(partition: Partition, owned: _Owned, why: str) -> Record:
    error = OffsetLost(f"{partition} does not have the offset where this consumer stands: {why}.")
    return Record(partition, owned.stored, owned.epoch, owned.stored, None, error)
