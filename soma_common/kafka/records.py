"""A Kafka record as an event, or as the error that says why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soma_common.consumer.source import Partition, Record
from soma_common.errors import CodecError, InfrastructureError, SomaError, UnknownSchemaId
from soma_common.events.codec import Codec
from soma_common.events.models import RecordedEvent


class Decoder:
    """Decodes records; what a codec refuses becomes the record's error."""

    def __init__(self, codec: Codec) -> None:
        self._decode = codec.decode
        self._ensure = getattr(codec, "ensure", None)

    async def record(self, partition: Partition, epoch: int, raw: Any) -> Record:
        """The record of an aiokafka ``ConsumerRecord``.

        Raises:
            InfrastructureError: its schema is unknown and the registry does not answer.
        """
        offset, key = raw.offset, raw.key
        try:
            return Record(partition, offset, epoch, offset + 1, await self._event(raw), key=key)
        except InfrastructureError:
            raise
        except SomaError as error:
            return Record(partition, offset, epoch, offset + 1, None, error, key)
        except Exception as error:
            # A codec must raise CodecError; whatever else bytes of strangers provoke must not end the consumer.
            strange = CodecError(f"The record cannot be decoded: {type(error).__name__}: {error}.")
            strange.__cause__ = error
            return Record(partition, offset, epoch, offset + 1, None, strange, key)

    async def _event(self, raw: Any) -> RecordedEvent:
        if raw.value is None:
            raise CodecError("The record has no value: a tombstone is not an event.")
        if raw.key is None:
            raise CodecError("The record has no key, so its place in an order is unknown.")
        headers = dict(raw.headers)
        try:
            event = self._decode(raw.value, headers)
        except UnknownSchemaId:
            if self._ensure is None:
                raise
            await self._ensure(raw.value, headers)
            event = self._decode(raw.value, headers)
        return _placed(event, headers)


def _placed(event: RecordedEvent, headers: Mapping[str, bytes]) -> RecordedEvent:
    """The event with the version and position that the relay put into the headers, where it did."""
    for name, field in (("soma_version", "version"), ("soma_position", "position")):
        text = headers.get(name)
        if text is None:
            continue
        if not text.isdigit() or len(text) > 19:
            raise CodecError(f"The record's header {name} is {text[:40]!r}, not a number.")
        # Nobody has seen this event yet; replace() would cost as much again as decoding it.
        object.__setattr__(event, field, int(text))
    return event
