"""What a transactional publisher remembers so that the end of a transaction can be written again (decision 0009)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

Written = frozenset[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Ending:
    """An end to write again: what is stored with it (None: an abort), and the partitions it belongs to."""

    stored: str | None
    partitions: Written


_GONE = object()


class Endings:
    """Follows the transactions of one producer.

    A coordinator takes partitions into a new transaction when the one before is complete. On the connection over which
    that one was committed this means that its markers were written. On another connection it need not: the broker may
    have been killed in between, and complete it without markers. So nothing is added to a transaction over another
    connection before the last commit was repeated.
    """

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer
        self._last: Ending | None = None
        self._before: str | None = None
        self._written: set[tuple[str, int]] = set()
        self._to_store: str | None = None
        self._added = False
        self._connection: Any = None
        sender = producer._sender
        sender._do_add_partitions_to_txn = self._watched(sender._do_add_partitions_to_txn)
        sender._do_add_offsets_to_txn = self._watched(sender._do_add_offsets_to_txn)

    def writes(self, topic: str, partition: int) -> None:
        """A batch is handed over."""
        self._written.add((topic, partition))

    def commits(self, stored: str) -> None:
        """The transaction is about to be committed."""
        self._to_store, self._connection = stored, self._coordinator() or _GONE

    def committed(self, before: str | None) -> None:
        """The coordinator said so; ``before`` was stored until then."""
        self._before, self._last = before, Ending(self._to_store or None, frozenset(self._written))
        self.aborted()

    def aborted(self) -> None:
        """Nothing is open."""
        self._written.clear()
        self._to_store, self._added = None, False

    def handed_over(self) -> None:
        """Another process has the identity: what is left of its transactions is not ours any more."""
        self._last, self._connection = None, None
        self.aborted()

    @property
    def doubtful(self) -> Ending | None:
        """The last commit, when the connection over which it was made is gone. To be repeated before anything else."""
        if self._last is None or self._connection is None or self._coordinator() is self._connection:
            return None
        return self._last

    def repeats(self) -> None:
        """The last commit is about to be repeated, over whatever connection there is."""
        self._connection = None

    def left_behind(self, known: str | None, stored: str | None, heir: Endings) -> Ending | None:
        """What the identity's next publisher has to write again; None: nothing, or somebody else has gone on since.

        ``known`` was stored as far as this publisher knew, ``stored`` is what the ``heir`` finds.

        Records of the open transaction can be in a partition only after a partition was added to it, and then the
        transaction before is complete.
        """
        if self._added:
            if self._to_store is not None and stored == (self._to_store or None):
                return Ending(stored, frozenset(self._written))
            return Ending(None, frozenset(self._written)) if stored == known else None
        if self._last is None or (stored is None and not self._precedes(heir)):
            return None  # in between somebody took the identity and made Kafka forget the cursor
        return self._last if stored in (self._before, self._last.stored) else None

    def _precedes(self, heir: Endings) -> bool:
        """Whether nobody had the identity in between: each holder raises its epoch by one."""
        mine, next_one = self._producer._txn_manager, heir._producer._txn_manager
        return bool((mine.producer_id, mine.producer_epoch + 1) == (next_one.producer_id, next_one.producer_epoch))

    def _coordinator(self) -> Any:
        """The open connection to the transaction coordinator, or None."""
        from aiokafka.client import ConnectionGroup, CoordinationType

        node = self._producer._sender._coordinators.get(CoordinationType.TRANSACTION)
        connection = self._producer.client._conns.get((node, ConnectionGroup.COORDINATION))
        return connection if connection is not None and connection.connected() else None

    def _watched(self, add: Callable[[Any], Awaitable[bool]]) -> Callable[[Any], Awaitable[bool]]:
        async def adding(what: Any) -> bool:
            from aiokafka.errors import OutOfOrderSequenceNumber

            if not self._added and self.doubtful is not None:
                # Ends the sender without a word; any other error it would log or try again.
                raise OutOfOrderSequenceNumber("the connection was lost after a commit, which is to be repeated")
            added = await add(what)
            self._added = self._added or added
            return added

        return adding
