"""Records of a topic read beside all consumers: assigned by hand, in no group, and nothing is committed."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError, OffsetOutOfRangeError

from soma_common.config import KafkaSecurity
from soma_common.consumer.source import Partition, Record
from soma_common.dlq.models import RawRecord
from soma_common.errors import BrokerUnavailable, ReplayRefused
from soma_common.events.codec import Codec
from soma_common.events.models import RecordedEvent
from soma_common.kafka.bounded import bounded
from soma_common.kafka.clients import client_arguments, unreachable
from soma_common.kafka.records import Decoder
from soma_common.kafka.topic_ids import topic_ids
from soma_common.ranges import check_settings

_CALL: Final = 10.0  # seconds that a question to the broker may take


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSettings:
    """How to read topics. ``wait`` (seconds) bounds one fetch, ``patience`` how long nothing may come."""

    bootstrap: str
    security: KafkaSecurity = field(default_factory=KafkaSecurity)
    wait: float = 0.5
    patience: float = 30.0

    def __post_init__(self) -> None:
        check_settings(self, wait=(0.001, 300), patience=(0.01, 86_400))


class TopicReader:
    """Reads partitions one at a time, from an offset to another. Connects at the first use."""

    def __init__(self, settings: ReaderSettings, codec: Codec) -> None:
        self.settings, self._decoder = settings, Decoder(codec)
        self._consumer: AIOKafkaConsumer | None = None
        self._at: tuple[Partition, int] | None = None
        self._heard = 0.0

    async def ranges(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """The first offset that is still there, and the one behind the last that readers of committed records may see.

        Raises:
            ReplayRefused: a topic does not exist.
            BrokerUnavailable: no broker answers.
        """
        try:
            consumer = await self._started()
            there = await bounded(consumer.topics(), _CALL)
            gone = sorted({partition.name for partition in partitions} - set(there))
            if gone:
                raise ReplayRefused(f"Kafka has no topic {', '.join(gone)}.", cure="check the names; was it deleted?")
            wanted = [TopicPartition(*partition) for partition in partitions]
            first = await bounded(consumer.beginning_offsets(wanted), _CALL)
            ends = await bounded(consumer.end_offsets(wanted), _CALL)
        except (KafkaError, OSError, TimeoutError) as error:
            raise unreachable(self.settings.bootstrap, error) from error
        return {Partition(*tp): (first[tp], ends[tp]) for tp in wanted}

    async def ids(self, names: Collection[str]) -> Mapping[str, UUID]:
        """The ids of topics, as far as the broker tells them: one that was made anew under its name has another.

        Raises:
            BrokerUnavailable: no broker answers.
        """
        try:
            consumer = await self._started()
            return await bounded(topic_ids(consumer._client, names), _CALL)
        except (KafkaError, OSError, TimeoutError) as error:
            raise unreachable(self.settings.bootstrap, error) from error

    async def read(
        self, partition: Partition, offset: int, end: int, limit: int, *, wait: float | None = None
    ) -> tuple[list[Record], int]:
        """The next records before the offset ``end``, decoded, and the offset behind them; maybe none yet.

        Args:
            wait: seconds that it may take; None: as the settings say.

        Raises:
            ReplayRefused: the topic does not have the offset any more, or is gone.
            BrokerUnavailable: no broker answers, or nothing comes.
            InfrastructureError: a schema is unknown and the registry does not answer.
        """
        try:
            consumer, tp = await self._started(), TopicPartition(*partition)
            if self._at != (partition, offset):
                consumer.assign([tp])
                consumer.seek(tp, offset)
                self._at, self._heard = (partition, offset), time.monotonic()
            raws, following = await self._fetch(consumer, tp, offset, limit, wait or self.settings.wait)
        except (KafkaError, IllegalStateError, OSError, TimeoutError) as error:
            await self._gone(partition, offset, error)
            raise unreachable(self.settings.bootstrap, error) from error
        records = await self._decoder.records(partition, 0, (raw for raw in raws if raw.offset < end))
        return records, min(following, end)

    async def _fetch(
        self, consumer: AIOKafkaConsumer, tp: Any, offset: int, limit: int, wait: float
    ) -> tuple[list[Any], int]:
        polling = consumer.getmany(tp, timeout_ms=int(wait * 1000), max_records=limit)
        raws = (await bounded(polling, wait + _CALL)).get(tp, [])
        following = await bounded(consumer.position(tp), _CALL)  # beyond markers and what was compacted away
        if following > offset:
            self._at, self._heard = (Partition(*tp), following), time.monotonic()
        elif time.monotonic() - self._heard > self.settings.patience:
            self._heard = time.monotonic()
            raise TimeoutError(f"nothing came of {tp.topic}[{tp.partition}] at {offset}")
        return raws, following

    async def _gone(self, partition: Partition, offset: int, error: BaseException) -> None:
        """Whether what was asked for is not there; else the broker is away."""
        self._at = None
        first, end = (offset + 1, offset) if isinstance(error, OffsetOutOfRangeError) else (0, offset)
        with suppress(BrokerUnavailable):
            first, end = (await self.ranges([partition]))[partition]
        if first > offset:
            raise ReplayRefused(
                f"{partition} does not have offset {offset} any more: it begins at {first}.",
                cure="cancel this replay; a new one begins with what the topic still has.",
            ) from error
        if isinstance(error, OffsetOutOfRangeError) and end < offset:
            raise ReplayRefused(
                f"{partition} does not have offset {offset}: it ends at {end}. It was made anew, or has lost records.",
                cure="cancel this replay; see to the live consumer first, which stands there as well.",
            ) from error

    async def _started(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            made = AIOKafkaConsumer(
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                **client_arguments(self.settings.bootstrap, self.settings.security),
            )
            try:
                await bounded(made.start(), _CALL)
            except (KafkaError, OSError, TimeoutError):
                await _close(made)
                raise
            self._consumer = made
        return self._consumer

    async def close(self) -> None:
        """Disconnect; safe to call twice."""
        consumer, self._consumer, self._at = self._consumer, None, None
        if consumer is not None:
            await _close(consumer)

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept.

        Raises:
            CodecError: there is none in it.
            InfrastructureError: its schema is unknown and the registry does not answer.
        """
        return await self._decoder.event(raw)


async def _close(consumer: AIOKafkaConsumer) -> None:
    with suppress(KafkaError, OSError, TimeoutError):
        await bounded(consumer.stop(), 5.0)
