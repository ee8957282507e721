"""A copy of each new dead letter for a Kafka topic, written to the outbox in the letter's own transaction."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import orjson

from soma_common.config import check_topic
from soma_common.dlq.failures import Failure, Stage, storable
from soma_common.dlq.models import Headers, Known, RawRecord, Status
from soma_common.errors import ConfigurationError
from soma_common.events.keys import murmur2
from soma_common.postgres.pool import fetch
from soma_common.sql.loader import blocks

_MOST_KEY: Final = 1024  # bytes
_TYPE: Final = "soma.dead_letter"


class HeaderStyle(StrEnum):
    """The headers that say what went wrong: this library's, those of Spring's DeadLetterPublishingRecoverer, or those
    of Kafka Connect's dead letter queue.
    """

    SOMA = "soma"
    SPRING = "spring"
    CONNECT = "connect"


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """Where copies of dead letters go, and in which style.

    Raises:
        ConfigurationError: no name of a topic, or no style.
    """

    topic: str = "soma.stack.dlq"
    style: HeaderStyle = HeaderStyle.SOMA

    def __post_init__(self) -> None:
        check_topic("mirror", self.topic)
        try:
            object.__setattr__(self, "style", HeaderStyle(self.style))
        except ValueError:
            raise ConfigurationError(f"style={self.style!r:.80}.", cure=f"use {', '.join(HeaderStyle)}.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A letter to be copied."""

    letter_id: UUID
    consumer: str
    status: Status
    record: RawRecord
    event: Known
    failure: Failure
    attempts: int


class Mirror:
    """Writes copies. Key, value and headers are the record's, byte for byte; the style's headers follow them."""

    def __init__(self, settings: MirrorSettings) -> None:
        self.settings = settings

    async def write(self, tx: Any, copied: Copied) -> None:
        """Add the copy to the outbox in the transaction of the letter: both are there, or neither.

        What comes from the topic of the copies itself is not copied: it would come round for ever.
        """
        record = copied.record
        if record.topic == self.settings.topic:
            return
        key = record.key or b""
        await fetch(
            tx,
            blocks("dead_letters")["mirror"],
            (
                self.settings.topic, murmur2(key), _indexed(key), copied.letter_id, copied.event.event_type or _TYPE,
                record.value or b"", raw_headers(record, headers_of(self.settings.style, copied)),
            ),
        )  # fmt: skip


def raw_headers(record: RawRecord, more: Headers) -> str:
    """The outbox's headers of a record that is sent as it is: ``{"raw": [[name, base64 or null], …], "null": […]}``.

    ``null`` names which of key and value are null: the outbox itself holds bytes only. ``key`` is there in base64 where
    it is too long for the outbox, which has its SHA-256 then.
    """
    names = [(_readable(name), _text(value)) for name, value in (*record.headers, *more)]
    nulls = [name for name, value in (("key", record.key), ("value", record.value)) if value is None]
    key = record.key or b""
    long = {} if _indexed(key) is key else {"key": _text(key)}
    return orjson.dumps({"raw": names, "null": nulls} | long).decode()


def headers_of(style: HeaderStyle, copied: Copied) -> Headers:
    """What went wrong, in a style; the letter's id in each, for those who must tell repeats."""
    headers = _STYLES[style](copied)
    return (*((name, _bytes(value)) for name, value in headers.items()), ("soma_dlq_letter_id", _id(copied)))


def _soma(copied: Copied) -> dict[str, Any]:
    record, failure = copied.record, copied.failure
    return {
        "soma_dlq_consumer": copied.consumer,
        "soma_dlq_status": copied.status.value,
        "soma_dlq_stage": failure.stage.value,
        "soma_dlq_attempts": str(copied.attempts),
        "soma_dlq_topic": record.topic,
        "soma_dlq_partition": str(record.partition),
        "soma_dlq_offset": str(record.offset),
        "soma_dlq_timestamp": _moment(record.timestamp).isoformat(),
        "soma_dlq_error_type": failure.error_type,
        "soma_dlq_error_message": failure.message,
        "soma_dlq_error_stack": failure.stack,
        "soma_dlq_fingerprint": failure.fingerprint,
    }


def _spring(copied: Copied) -> dict[str, Any]:
    """Spring for Apache Kafka: numbers are big-endian, 4 and 8 bytes long."""
    record, failure = copied.record, copied.failure
    return {
        "kafka_dlt-original-topic": record.topic,
        "kafka_dlt-original-partition": struct.pack(">i", record.partition),
        "kafka_dlt-original-offset": struct.pack(">q", record.offset),
        "kafka_dlt-original-timestamp": struct.pack(">q", int(_moment(record.timestamp).timestamp() * 1000)),
        "kafka_dlt-original-timestamp-type": "CreateTime" if record.timestamp is not None else "NoTimestampType",
        "kafka_dlt-original-consumer-group": copied.consumer,
        "kafka_dlt-exception-fqcn": failure.error_type,
        "kafka_dlt-exception-message": failure.message,
        "kafka_dlt-exception-stacktrace": failure.stack,
    }


_CONNECT_STAGES: Final = {Stage.DECODE: "VALUE_CONVERTER", Stage.VALIDATE: "TRANSFORMATION"}


def _connect(copied: Copied) -> dict[str, Any]:
    """Kafka Connect: everything is text."""
    record, failure = copied.record, copied.failure
    return {
        "__connect.errors.topic": record.topic,
        "__connect.errors.partition": str(record.partition),
        "__connect.errors.offset": str(record.offset),
        "__connect.errors.connector.name": copied.consumer,
        "__connect.errors.task.id": "0",
        "__connect.errors.stage": _CONNECT_STAGES.get(failure.stage, "TASK_PUT"),
        "__connect.errors.class.name": "soma_common.consumer",
        "__connect.errors.exception.class.name": failure.error_type,
        "__connect.errors.exception.message": failure.message,
        "__connect.errors.exception.stacktrace": failure.stack,
    }


_STYLES: Final[dict[HeaderStyle, Callable[[Copied], dict[str, Any]]]] = {
    HeaderStyle.SOMA: _soma,
    HeaderStyle.SPRING: _spring,
    HeaderStyle.CONNECT: _connect,
}


def _moment(given: datetime | None) -> datetime:
    return given or datetime.fromtimestamp(0, UTC)


def _id(copied: Copied) -> bytes:
    return str(copied.letter_id).encode()


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace")


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _indexed(key: bytes) -> bytes:
    """A key by which the relay can park the row: an entry of an index has its limit, a record's key has none."""
    return key if len(key) <= _MOST_KEY else b"sha256:" + hashlib.sha256(key).digest()


def _readable(name: str) -> str:
    """A header's name that clients can write: bytes that were no UTF-8 are replaced."""
    return storable(name, 4 * len(name))
