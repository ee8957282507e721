"""Dead letters as values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from soma_common.dlq.failures import Failure, Stage, storable
from soma_common.errors import ValidationError
from soma_common.events.models import RecordedEvent

_MOST_SEQUENCE = 512  # bytes; an index entry has its limit, a Kafka key has none
_MOST_NAME = 512


class Status(StrEnum):
    """What a letter waits for.

    ``retrying``: its next automatic try. ``dead``: a person. ``redriving``: the try that a person asked for.
    ``blocked``: it did not fail itself; it stands behind one that did. ``resolved``: applied after all.
    ``discarded``: given up.
    """

    RETRYING = "retrying"
    BLOCKED = "blocked"
    DEAD = "dead"
    REDRIVING = "redriving"
    RESOLVED = "resolved"
    DISCARDED = "discarded"


OPEN: Final = (Status.RETRYING, Status.BLOCKED, Status.DEAD, Status.REDRIVING)

OF_RELAY, OF_SAGA = -1, -2
"""In place of a partition: the record is a row of the outbox, or what a saga was started with."""

Headers = tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """A record as it came, byte for byte. Headers may repeat; a value of None is not the empty one."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = ()
    timestamp: datetime | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of key and value: tells the records of a topic and of its recreated namesake apart."""
        digest = hashlib.sha256()
        for part in (self.key, self.value):
            digest.update(b"-" if part is None else b"%d:" % len(part))
            digest.update(part or b"")
        return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of the event in a record; nothing, when it could not be decoded."""

    event_id: UUID | None = None
    event_type: str | None = None
    tenant_id: str | None = None
    service_id: str | None = None
    idempotency_key: str | None = None
    trace_id: UUID | None = None

    @classmethod
    def of(cls, event: RecordedEvent | None) -> Known:
        """Of a decoded event; names that PostgreSQL could not hold are made storable."""
        if event is None:
            return cls()
        return cls(
            event_id=event.event_id,
            event_type=storable(event.event_type, _MOST_NAME),
            tenant_id=storable(event.tenant_id, _MOST_NAME),
            service_id=storable(event.service_id, _MOST_NAME),
            idempotency_key=storable(event.idempotency_key, _MOST_NAME),
            trace_id=UUID(event.trace_id),
        )


def sequence_of(record: RawRecord, *, by_partition: bool = False) -> bytes:
    """What stays in order with a record: its key, or its partition where it has none or the consumer orders by it.

    At most 512 bytes: a longer key stands by its SHA-256. The first byte says which it is, so that none can be taken
    for another.
    """
    if by_partition or record.key is None:
        return sequence_of_partition(record.topic, record.partition)
    return sequence_of_key(record.key)


def sequence_of_key(key: bytes) -> bytes:
    """The sequence of all records with this key."""
    return _bounded(b"k", key)


def sequence_of_partition(topic: str, partition: int) -> bytes:
    """The sequence of all records of a partition."""
    return _bounded(b"p", f"{topic}[{partition}]".encode("utf-8", "surrogatepass"))


def sequence_of_record(topic: str, partition: int, offset: int) -> bytes:
    """The sequence of one record alone, where the consumer keeps no order."""
    return _bounded(b"r", f"{topic}[{partition}]@{offset}".encode("utf-8", "surrogatepass"))


def _bounded(kind: bytes, name: bytes) -> bytes:
    if len(name) < _MOST_SEQUENCE:
        return kind + name
    return kind.upper() + hashlib.sha256(name).digest()


@dataclass(frozen=True, slots=True)
class RedrivePolicy:
    """Automatic tries of a parked letter: the first after ``after`` seconds, then each ``factor`` times later.

    After ``tries`` of them (0: none) the letter is dead and waits for a person.
    """

    after: float = 3600.0
    tries: int = 3
    factor: float = 1.0
    most: float = 86_400.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, int | float) for value in (self.after, self.tries, self.factor, self.most))
        if not (
            numbers
            and 0 <= self.tries <= 1000
            and 0 < self.after <= self.most <= 365 * 86_400
            and 1 <= self.factor <= 100
        ):
            raise ValidationError(
                f"{self} cannot be followed.",
                cure="0 to 1000 tries, 0 < after <= most <= a year (seconds), factor 1 to 100.",
            )

    def delay(self, left: int) -> float | None:
        """Seconds until the next try when so many are left; None when there is none."""
        if left <= 0:
            return None
        return float(min(self.most, self.after * self.factor ** min(max(0, self.tries - left), 60)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A dead letter without its bytes. ``place`` orders letters; ``size`` is that of the value in bytes.

    ``stage`` and the error's fields are None for a letter that never failed itself. ``message`` is cut to 500
    characters; :class:`FullLetter` has all of it.
    """

    place: int
    letter_id: UUID
    consumer: str
    sequence: bytes
    status: Status
    stage: Stage | None
    topic: str
    partition: int
    offset: int
    event: Known
    error_type: str | None
    message: str | None
    fingerprint: str | None
    attempts: int
    next_at: datetime | None
    automatic_left: int
    edited_by: str | None
    edited_at: datetime | None
    revision: int
    parked_at: datetime
    changed_at: datetime
    size: int

    @property
    def origin(self) -> str:
        """Where its record came from, in a few words."""
        if self.partition == OF_SAGA:
            return f"saga {self.event.event_id}"
        if self.partition < 0:  # it never got as far as a partition
            return f"{self.topic}, outbox row {self.offset}"
        return f"{self.topic}[{self.partition}]@{self.offset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FullLetter:
    """A letter with everything that is kept of it. ``record`` is the original, whatever was edited."""

    letter: Letter
    record: RawRecord
    message: str | None
    stack: str | None
    edited_value: bytes | None

    @property
    def value(self) -> bytes | None:
        """What a try works with: the edited value, else the original."""
        return self.record.value if self.edited_value is None else self.edited_value


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterNotice:
    """What the hook ``on_dead_letter`` is told when an event became a letter, or a letter died.

    ``retry_in``: seconds until the first automatic try of a ``retrying`` letter; None for a dead one.
    """

    consumer: str
    status: Status
    record: RawRecord
    event: Known
    failure: Failure
    attempts: int
    retry_in: float | None = None

    @property
    def place(self) -> str:
        """Consumer and record in words."""
        return f"{self.consumer}, {self.record.topic}[{self.record.partition}]@{self.record.offset}"


@dataclass(frozen=True, slots=True)
class LetterPage:
    """Found letters. ``next_cursor`` is what to pass for the next page, None at the end."""

    letters: tuple[Letter, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Letters of one consumer, status and fingerprint; the example is the newest of them."""

    consumer: str
    status: Status
    fingerprint: str | None
    count: int
    oldest: datetime
    newest: datetime
    example: UUID
    error_type: str | None
    message: str | None
    event_type: str | None


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """What was done with a letter. ``value`` is the new value of an edit."""

    at: datetime
    who: str
    what: str
    why: str | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Lease:
    """A sequence that this worker may re-drive until ``until`` (the database's clock).

    ``leases``: how often it was leased since one of its letters was settled, or a lease was given back in good order.
    """

    consumer_id: int
    sequence: bytes
    token: UUID
    owner: str
    until: datetime
    leases: int = 1
