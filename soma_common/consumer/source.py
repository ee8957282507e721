"""Where a consumer's events come from: one protocol for Kafka and for the event log itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from soma_common.dlq.models import RawRecord
from soma_common.errors import SomaError
from soma_common.events.models import RecordedEvent


class Partition(NamedTuple):
    """A part of the stream whose events come in order: a topic's partition, or a shard of the log's reader."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}[{self.number}]"


Place = tuple[Partition, int]  # and an offset in it


class Record(NamedTuple):
    """A place in a partition and the event found there, or the error that says why there is none.

    ``offset`` is Kafka's offset or the log's position; ``size`` is about what it holds in memory, in bytes. ``after``,
    ``epoch`` and ``raw`` are the source's own: by what it knows where it stands once this record is done, under which
    assignment the record was read, and what it came as.
    """

    partition: Partition
    offset: int
    epoch: int
    after: Any
    event: RecordedEvent | None
    error: SomaError | None = None
    key: bytes | None = None
    size: int = 0
    raw: Any = None

    @property
    def place(self) -> Place:
        """Where it was found."""
        return self.partition, self.offset


# A record of all its fields, in their order: a named tuple's own constructor takes twice as long.
made_record: Final[Callable[[tuple[Any, ...]], Record]] = partial(tuple.__new__, Record)

Drain = Callable[[Collection[Partition]], Awaitable[None]]


class Source(Protocol):
    """Hands out records of the partitions this process owns, and keeps its positions in PostgreSQL.

    Promises: the records of one partition come in order and without a gap, beginning at the stored position;
    ``save`` is refused with ``LeaseLost`` when a partition was given to somebody else since its record was read, or
    when the database was set back; no record is delivered twice unless ``rewind`` was called or the partition was
    assigned anew.
    """

    def check_drain(self, seconds: float) -> None:
        """Whether a drain may take so long: ConfigurationError when partitions go to others sooner than that."""

    async def start(self, consumer_id: int, drain: Drain) -> None:
        """Join. The source awaits ``drain`` with the partitions that it is about to give away: when it returns, nothing
        of them is in flight, and what was done is saved.

        Raises:
            InfrastructureError: call it again later.
        """

    async def fetch(self, most: int, without: Collection[Partition] = ()) -> Sequence[Record]:
        """The next records, at most so many, none of the partitions ``without``; none after a short wait.

        Raises InfrastructureError, or what ends the consumer.
        """

    async def stay(self, seconds: float) -> None:
        """Wait with every partition full: hand out nothing, and keep what we own.

        Raises InfrastructureError, or what ends the consumer.
        """

    def delivers(self, record: Record) -> bool:
        """Whether the record's partition is still ours under the assignment in which it was read."""

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        """Write that these records (and all before them in their partitions) are done, in the transaction ``tx``.

        Raises:
            LeaseLost: a partition is no longer ours, or the database was set back; roll the transaction back.
        """

    async def saved(self, records: Sequence[Record]) -> None:
        """The transaction of ``save`` has committed."""

    async def rewind(self) -> None:
        """Forget what was fetched and begin again at the stored positions, under new epochs."""

    def halt(self, partition: Partition) -> None:
        """Deliver nothing more of a partition while it stays assigned."""

    @property
    def assigned(self) -> frozenset[Partition]:
        """The partitions this process owns, halted ones included."""

    @property
    def halted(self) -> frozenset[Partition]:
        """The owned partitions that were halted under their present assignment."""

    def lag(self) -> Mapping[Partition, int]:
        """How far the end of each owned partition is from the stored position, as far as it is known."""

    def raw(self, record: Record) -> RawRecord:
        """The record as it came, for a dead letter."""

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """The event in a record that a dead letter kept.

        Raises:
            CodecError: there is none in it.
            InfrastructureError: its schema cannot be had now.
        """

    async def stop(self) -> None:
        """Leave; safe to call twice."""
