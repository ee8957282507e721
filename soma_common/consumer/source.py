"""Where a consumer's events come from: one protocol for Kafka and for the event log itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from soma_common.errors import SomaError
from soma_common.events.models import RecordedEvent

Drain = Callable[[], Awaitable[None]]


class Partition(NamedTuple):
    """A part of the stream whose events come in order: a topic's partition, or a shard of the log's reader."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}[{self.number}]"


class Record(NamedTuple):
    """A place in a partition and the event found there, or the error that says why there is none.

    ``offset`` is Kafka's offset or the log's position. ``after`` and ``epoch`` are the source's own: what it stores
    once this record is done, and under which assignment the record was read.
    """

    partition: Partition
    offset: int
    epoch: int
    after: Any
    event: RecordedEvent | None
    error: SomaError | None = None
    key: bytes | None = None


class Source(Protocol):
    """Hands out records of the partitions this process owns, and keeps its positions in PostgreSQL.

    Promises: the records of one partition come in order and without a gap, beginning at the stored position;
    ``save`` is refused with ``LeaseLost`` when a partition was given to somebody else since its record was read, or
    when the database was set back; no record is delivered twice unless ``rewind`` was called.
    """

    async def start(self, consumer_id: int, drain: Drain) -> None:
        """Join. The source awaits ``drain`` before it gives a partition away: it returns when nothing is in flight.

        Raises:
            InfrastructureError: call it again later.
        """

    async def fetch(self, most: int) -> Sequence[Record]:
        """The next records, at most so many; none after a short wait in which nothing came.

        Call it only when what it returned before is settled. Raises InfrastructureError, or what ends the consumer.
        """

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        """Write that these records (and all before them in their partitions) are done, in the transaction ``tx``.

        Raises:
            LeaseLost: a partition is no longer ours; the transaction must be rolled back.
        """

    async def committed(self, records: Sequence[Record]) -> None:
        """The transaction of ``save`` has committed."""

    async def rewind(self) -> None:
        """Forget what was fetched and begin again at the stored positions.

        When it returns, an earlier transaction whose outcome is unknown has taken effect or never will.
        """

    def halt(self, partition: Partition) -> None:
        """Deliver nothing more of a partition while it stays assigned."""

    @property
    def assigned(self) -> frozenset[Partition]:
        """The partitions this process owns, halted ones included."""

    @property
    def halted(self) -> frozenset[Partition]:
        """The owned partitions that were halted under their present assignment."""

    async def stop(self) -> None:
        """Leave; safe to call twice."""
