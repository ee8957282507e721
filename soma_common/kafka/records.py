"""A Kafka record as an event, or as the error that says why it is none."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from soma_common.consumer.source import Partition, Record, made_record
from soma_common.dlq.models import RawRecord
from soma_common.errors import CodecError, InfrastructureError, UnknownSchemaId
from soma_common.events.codec import Codec, placed
from soma_common.events.models import RecordedEvent

_ENVELOPE = 500  # bytes that an event takes beside its value, about


class Decoder:
    """Decodes records; what a codec refuses becomes the record's error."""

    def __init__(self, codec: Codec) -> None:
        self._decode = codec.decode
        self._ensure = getattr(codec, "ensure", None)

    async def records(self, partition: Partition, epoch: int, raws: Iterable[Any]) -> list[Record]:
        """The records of aiokafka's ``ConsumerRecord`` s.

        Raises:
            InfrastructureError: a schema is unknown and the registry does not answer.
        """
        records = []
        for raw in raws:
            event: RecordedEvent | None = None
            error: CodecError | None = None
            try:
                event = self._event(raw)  # as a coroutine it would cost a fifth more, for each of all events
            except UnknownSchemaId:
                event, error = await self._learned(raw)
            except CodecError as refused:
                error = refused
            offset, size = raw.offset, _ENVELOPE + max(0, raw.serialized_value_size)
            records.append(made_record((partition, offset, epoch, offset + 1, event, error, raw.key, size, raw)))
        return records

    async def _learned(self, raw: Any) -> tuple[RecordedEvent | None, CodecError | None]:
        try:
            return await self.event(raw), None
        except CodecError as error:
            return None, error

    async def event(self, raw: Any) -> RecordedEvent:
        """The event in something with a key, a value and headers.

        Raises:
            CodecError: there is none in it.
            InfrastructureError: its schema is unknown and the registry does not answer.
        """
        try:
            return self._event(raw)
        except UnknownSchemaId:
            if self._ensure is None:
                raise
            try:
                await self._ensure(raw.value, dict(raw.headers))
            except (CodecError, InfrastructureError):
                raise
            except Exception as error:
                raise _undecodable(error) from error
            return self._event(raw)

    def _event(self, raw: Any) -> RecordedEvent:
        if raw.value is None:
            raise CodecError("The record has no value: a tombstone is not an event.")
        if raw.key is None:
            raise CodecError("The record has no key, so its place in an order is unknown.")
        try:
            headers = dict(raw.headers)
            return placed(self._decode(raw.value, headers), headers)
        except (CodecError, InfrastructureError):
            raise
        except Exception as error:
            raise _undecodable(error) from error


def _undecodable(error: Exception) -> CodecError:
    """A codec must raise CodecError; whatever else bytes of strangers provoke must not end the consumer."""
    return CodecError(f"The record cannot be decoded: {type(error).__name__}: {error}.")


def raw_record(partition: Partition, raw: Any) -> RawRecord:
    """A record byte for byte, as a dead letter keeps it."""
    return RawRecord(
        topic=partition.name,
        partition=partition.number,
        offset=raw.offset,
        key=raw.key,
        value=raw.value,
        headers=tuple(raw.headers),
        timestamp=datetime.fromtimestamp(raw.timestamp / 1000, UTC) if raw.timestamp >= 0 else None,
    )
