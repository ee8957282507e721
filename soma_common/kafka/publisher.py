"""The relay's publisher on Kafka: full batches per partition, idempotent, optionally in transactions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from soma_common.config import KafkaSecurity
from soma_common.errors import ConfigurationError, LeaseLost, SomaError
from soma_common.kafka.admin import TopicAdmin, TopicSettings
from soma_common.kafka.batches import Batch, batches_of
from soma_common.kafka.clients import client_arguments, unreachable
from soma_common.kafka.endings import Ending, Endings
from soma_common.kafka.spans import sending_span
from soma_common.outbox.publishing import Delivery, Sending
from soma_common.ranges import check_settings
from soma_common.tracing.tracer import TransactionTracer

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

log = logging.getLogger(__name__)

_COMPRESSIONS: Final = ("snappy", "lz4", "zstd", "gzip", None)
_FORGET_ATTEMPTS: Final = 20
CURSOR_TOPIC: Final = "soma.relay.cursors"
# Errors of a batch that will be the same next time (names in org.apache.kafka.common.protocol.Errors).
_NEVER: Final = frozenset({10, 17, 18, 29, 32, 44, 87})


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherSettings:
    """How to talk to Kafka.

    Args:
        compression: snappy, lz4, zstd, gzip or None.
        batch_bytes: the most a batch holds before compression; one larger record is sent alone.
        delivery_timeout: seconds without any acknowledgement after which a send is given up and begun anew.
        open_timeout: seconds to connect and to take an identity over.
        transaction_timeout: seconds after which Kafka aborts a transaction whose relay is gone.
    """

    bootstrap: str
    security: KafkaSecurity = field(default_factory=KafkaSecurity)
    compression: str | None = "snappy"
    batch_bytes: int = 512 * 1024
    delivery_timeout: float = 30.0
    open_timeout: float = 15.0
    transaction_timeout: float = 60.0

    def __post_init__(self) -> None:
        check_settings(
            self, batch_bytes=(1, 1 << 30), delivery_timeout=(0.01, 86_400), open_timeout=(0.01, 86_400),
            transaction_timeout=(0.1, 86_400),
        )  # fmt: skip
        if self.compression not in _COMPRESSIONS:
            raise ConfigurationError(
                f"compression={self.compression!r:.80}.", cure=f"use one of: {', '.join(map(str, _COMPRESSIONS))}."
            )


class KafkaPublisher:
    """One producer. See :class:`soma_common.outbox.publishing.Publisher` for what it promises.

    aiokafka sends the next batch of a partition even when the one before it failed for good, and a broker without
    state of this producer takes it. So a batch is handed over only after its predecessor is acknowledged, and the
    first failure ends the publisher.
    """

    def __init__(self, producer: AIOKafkaProducer, settings: PublisherSettings, identity: str | None) -> None:
        self._producer, self._settings, self._identity = producer, settings, identity
        self._lanes: dict[tuple[str, int], asyncio.Lock] = {}
        self._broken = False
        self._in_transaction = False
        self._acknowledged_at = 0.0
        self._tracer = TransactionTracer()
        self.endings = Endings(producer)
        self.stored: str | None = None

    async def send(self, sending: Sending) -> Delivery:
        """Build, send and await every batch."""
        try:
            await self._begin()
        except Exception as error:
            return Delivery(sending.rows, (), self.meaning(error))
        batches: list[Batch] = []
        deliveries: list[asyncio.Task[None]] = []
        for batch in batches_of(self._producer.create_batch, sending):
            batches.append(batch)
            deliveries.append(asyncio.create_task(self._deliver(batch)))
            await asyncio.sleep(0)
        late = await self._settled(deliveries)
        return self._outcome(batches, late)

    async def commit(self, stored: str) -> None:
        """Commit what was sent, and ``stored`` as the metadata of an offset."""
        from aiokafka.structs import OffsetAndMetadata, TopicPartition

        try:
            async with asyncio.timeout(self._settings.delivery_timeout):
                await self._begin()
                place = {TopicPartition(CURSOR_TOPIC, 0): OffsetAndMetadata(0, stored)}
                await self._producer.send_offsets_to_transaction(place, self._identity)
                self.endings.commits(stored)
                await self._producer.commit_transaction()
        except Exception as error:
            self._broken = True
            raise self.meaning(error) from error
        self.endings.committed(self.stored)
        self._in_transaction, self.stored = False, stored or None

    async def end_again(self, ending: Ending) -> None:
        """Write the end of an earlier transaction of this identity into its partitions once more (decision 0009).

        Raises:
            LeaseLost, BrokerUnavailable: as ``commit``.
        """
        from aiokafka.structs import TopicPartition

        self.endings.repeats()
        await self._begin()
        for partition in ending.partitions:
            self.endings.writes(*partition)
            self._producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(*partition))
        if ending.stored is not None:
            await self.commit(ending.stored)
            return
        await self._producer.abort_transaction()
        self.endings.aborted()
        self._in_transaction = False

    async def close(self) -> None:
        """Leave; an open transaction is aborted by the identity's next holder, or by Kafka after its timeout."""
        await abandon(self._producer)

    async def read_stored(self) -> None:
        """Fetch what the identity's last transaction stored. Only right once the identity is ours."""
        from aiokafka.errors import KafkaError

        while True:
            try:
                self.stored = await self._fetch_stored()
                return
            except KafkaError as error:
                # A coordinator that moves, loads or is being made says so: that is not "nothing stored".
                if not error.retriable:
                    raise
            await asyncio.sleep(0.1)

    async def _fetch_stored(self) -> str | None:
        from aiokafka.client import ConnectionGroup, CoordinationType
        from aiokafka.errors import for_code
        from aiokafka.protocol.commit import OffsetFetchRequest

        client = self._producer.client
        node = await client.coordinator_lookup(CoordinationType.GROUP, self._identity)
        request = OffsetFetchRequest(self._identity, [(CURSOR_TOPIC, [0])])
        answer = await client.send(node, request, group=ConnectionGroup.COORDINATION)
        _, _, metadata, code = answer.topics[0][1][0] if answer.topics else (0, 0, "", 0)
        for failure in (getattr(answer, "error_code", 0), code):
            if failure:
                raise for_code(failure)()
        return metadata or None

    async def _begin(self) -> None:
        if self._identity is not None and not self._in_transaction:
            doubtful = self.endings.doubtful
            if doubtful is not None:
                await self.end_again(doubtful)
            await self._producer.begin_transaction()
            self._in_transaction = True

    async def _deliver(self, batch: Batch) -> None:
        lane = self._lanes.setdefault((batch.topic, batch.partition), asyncio.Lock())
        self.endings.writes(batch.topic, batch.partition)
        async with lane:
            if self._broken:
                return
            try:
                with sending_span(self._tracer, batch):
                    sent = await self._producer.send_batch(batch.builder, batch.topic, partition=batch.partition)
                    await sent
            except Exception as error:
                self._broken = True
                batch.error = error
                return
            batch.acknowledged = True
            self._acknowledged_at = asyncio.get_running_loop().time()

    async def _settled(self, deliveries: Sequence[asyncio.Task[None]]) -> bool:
        """Wait for all; True when there was no acknowledgement for too long."""
        loop, limit = asyncio.get_running_loop(), self._settings.delivery_timeout
        self._acknowledged_at = loop.time()
        pending = set(deliveries)
        try:
            while pending:
                left = self._acknowledged_at + limit - loop.time()
                if left <= 0:
                    return True
                _, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in pending:
                task.cancel()
            if pending:
                self._broken = True
                await asyncio.wait(pending)
        return False

    def _outcome(self, batches: Sequence[Batch], late: bool) -> Delivery:
        unsent = [batch for batch in batches if not batch.acknowledged]
        if not unsent:
            return Delivery()
        refused = [(batch.rows, _reason(batch)) for batch in unsent if _code(batch.error) in _NEVER]
        others = [batch.error for batch in unsent if batch.error is not None and _code(batch.error) not in _NEVER]
        error = self.meaning(others[0]) if others else None
        if late and error is None:
            error = unreachable(
                self._settings.bootstrap,
                TimeoutError(f"no acknowledgement for {self._settings.delivery_timeout:.0f} s"),
            )
        return Delivery([row for batch in unsent for row in batch.rows], refused, error)

    def meaning(self, error: BaseException) -> Exception:
        """The library's error for aiokafka's.

        A broker that answers "unknown server error" is one whose outcome is not known: Kafka 4.3.1 says so to an end
        of a transaction that meets its fencing half way.
        """
        from aiokafka.errors import InvalidProducerEpoch, ProducerFenced

        if isinstance(error, SomaError):
            return error
        if isinstance(error, ProducerFenced | InvalidProducerEpoch):
            self.endings.handed_over()
            return LeaseLost(f"Another process took {self._identity} over.")
        return unreachable(self._settings.bootstrap, error)


class KafkaPublishers:
    """Makes publishers for a relay; the wiring of relay and Kafka."""

    def __init__(self, settings: PublisherSettings) -> None:
        self.settings = settings
        self.admin = TopicAdmin(settings.bootstrap, settings.security)
        self._arguments = client_arguments(settings.bootstrap, settings.security)
        self._has_cursor_topic = False
        self._opened: dict[str, KafkaPublisher] = {}

    async def open(self, identity: str | None) -> KafkaPublisher:
        """Connect; with an identity: fence its other holders off, then read what it stored.

        Raises:
            BrokerUnavailable: no broker answered in time.
            LeaseLost: the next holder was there before this one had begun.
        """
        from aiokafka.errors import KafkaError

        if identity is not None and not self._has_cursor_topic:
            await self.admin.ensure([TopicSettings(CURSOR_TOPIC, partitions=1)])
            self._has_cursor_topic = True
        producer = self.producer(identity)
        publisher = KafkaPublisher(producer, self.settings, identity)
        try:
            async with asyncio.timeout(self.settings.open_timeout):
                await producer.start()
                if identity is not None:
                    await publisher.read_stored()
                    await self._end_again(identity, publisher)
        except (KafkaError, OSError, TimeoutError) as error:
            await publisher.close()
            raise publisher.meaning(error) from error
        except BaseException:
            await publisher.close()
            raise
        return publisher

    async def _end_again(self, identity: str, publisher: KafkaPublisher) -> None:
        """What the publisher before may have left without its end, ends now."""
        before = self._opened.get(identity)
        ending = before.endings.left_behind(before.stored, publisher.stored, publisher.endings) if before else None
        if ending is not None:
            await publisher.end_again(ending)
        self._opened[identity] = publisher

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has now."""
        return await self.admin.partitions(topic)

    async def close(self) -> None:
        """Disconnect."""
        await self.admin.close()

    def producer(self, identity: str | None) -> AIOKafkaProducer:
        """A producer that is not started yet."""
        from aiokafka import AIOKafkaProducer

        try:
            return AIOKafkaProducer(
                **self._arguments,
                acks="all",
                enable_idempotence=True,
                transactional_id=identity,
                transaction_timeout_ms=int(self.settings.transaction_timeout * 1000),
                compression_type=self.settings.compression,
                max_batch_size=self.settings.batch_bytes,
                request_timeout_ms=int(self.settings.open_timeout * 1000),
                # The first batch of a transaction that closely follows another one is refused and sent again.
                retry_backoff_ms=20,
                metadata_max_age_ms=30_000,
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(f"Kafka settings: {error}.", cure="check the compression's name.") from error


async def abandon(producer: AIOKafkaProducer) -> None:
    """End a producer without waiting for acknowledgements: ``stop`` would wait for a broker that is away."""
    sender = producer._sender.sender_task
    if sender is not None and not sender.done():
        sender.cancel()
    await producer.client.close()
    while sender is not None and not sender.done():
        # The cancelled sender waits for its requests; a second cancellation reaches those.
        await asyncio.wait({sender}, timeout=0.5)
        sender.cancel()
    # A fenced producer also fails futures that nobody awaits, and asyncio would complain about them at some later time.
    undrained = [batch._drain_waiter for lane in producer._message_accumulator._batches.values() for batch in lane]
    for left in (producer._txn_manager and producer._txn_manager.wait_for_transaction_end(), sender, *undrained):
        if left is not None and left.done() and not left.cancelled():
            left.exception()
    producer._closed = True


def _code(error: BaseException | None) -> int | None:
    return getattr(error, "errno", None) if error is not None and not isinstance(error, OSError) else None


def _reason(batch: Batch) -> str:
    return f"Kafka refused it for topic {batch.topic}: {type(batch.error).__name__}"


async def forget_cursors(publishers: KafkaPublishers, identities: Sequence[str]) -> None:
    """Make Kafka forget the cursors of these identities: their relays resume from the database's copy.

    Fences the current holders off, so relays may run; one that takes its identity back before the cursor is forgotten
    is fenced off again.

    Raises:
        BrokerUnavailable: no broker answered.
        LeaseLost: a relay was quicker every time.
    """
    for identity in identities:
        for attempt in range(_FORGET_ATTEMPTS):
            try:
                await _forget(publishers, identity)
                break
            except LeaseLost:
                if attempt + 1 == _FORGET_ATTEMPTS:
                    raise


async def _forget(publishers: KafkaPublishers, identity: str) -> None:
    publisher = await publishers.open(identity)
    try:
        await publisher.commit("")
    finally:
        await publisher.close()
