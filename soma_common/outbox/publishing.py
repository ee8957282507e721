"""What the relay wants of a broker. The relay knows no broker, and the broker's side knows no database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from soma_common.errors import SomaError
from soma_common.postgres.pool import Row

# The columns of a row of the outbox, as sql/outbox.sql selects them.
POSITION: Final = 0
KEY_HASH: Final = 1
TOPIC: Final = 2
KEY: Final = 3
EVENT_ID: Final = 4
EVENT_TYPE: Final = 5
VERSION: Final = 6
TIMESTAMP_MS: Final = 7
VALUE: Final = 8
HEADERS: Final = 9
SHARD: Final = 10


class TopicRefused(SomaError):
    """The broker takes no records for this topic: it is unknown, its name is invalid, or access is denied."""


@dataclass(frozen=True, slots=True)
class Sending:
    """Rows to send, each key in its order.

    ``partitions`` gives the number of partitions by topic. ``portions`` names rows that were in a batch which the
    broker refused: they go in batches of at most so many records, to find out which of them it was.
    """

    rows: Sequence[Row]
    partitions: Mapping[str, int]
    portions: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a send ended: everything is acknowledged but ``unsent``.

    ``refused`` holds batches that the broker will never take as they are, with its reason; ``error`` is why the rest
    of ``unsent`` was not acknowledged. After anything but a full success the publisher is spent: close it.
    """

    unsent: Sequence[Row] = ()
    refused: Sequence[tuple[Sequence[Row], str]] = ()
    error: Exception | None = None


class Publisher(Protocol):
    """Brings rows to a broker, keeping the order of each key."""

    stored: str | None
    """What the last committed transaction of this identity stored, read after the identity was taken over."""

    async def send(self, sending: Sending) -> Delivery:
        """Send rows and wait for every acknowledgement.

        Promises: of the rows of one key, later ones are never sent before earlier ones are acknowledged, also across
        calls and failures. The same row has the same bytes every time. In a transaction nothing is visible before
        ``commit``. Never raises for what the broker says: that is in the Delivery.
        """

    async def commit(self, stored: str) -> None:
        """End the transaction with all that was sent since the last commit; ``stored`` is committed with it.

        Raises:
            LeaseLost: another process took this identity over: nothing of this transaction is or gets visible.
            BrokerUnavailable: the outcome is unknown; open the identity again and read ``stored``.
        """

    async def close(self) -> None:
        """Give up what is not acknowledged or committed, and disconnect; never waits for the broker for long."""


class PublisherFactory(Protocol):
    """Makes publishers and knows topics."""

    async def open(self, identity: str | None) -> Publisher:
        """A connected publisher. With an identity it is transactional, and every other holder of that identity is
        fenced off before ``stored`` is read.

        Raises:
            BrokerUnavailable: no broker answered in time.
            LeaseLost: the next holder was there before this one had begun.
        """

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has now.

        Raises:
            TopicRefused: the broker takes no records for it.
            BrokerUnavailable: no broker answered in time.
        """

    async def close(self) -> None:
        """Disconnect."""
