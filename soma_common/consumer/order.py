"""What stays in order: a sequence is a key, a partition, or a record alone."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from soma_common.consumer.source import Record
from soma_common.dlq.models import sequence_of_key, sequence_of_partition, sequence_of_record

SequenceOf = Callable[[Record], bytes]


class Order(StrEnum):
    """Which events wait for each other.

    ``key``: those of a key; keys go side by side. ``partition``: those of a partition, also behind a dead letter.
    ``none``: nothing waits; a failing event is passed by later ones of its key.
    """

    KEY = "key"
    PARTITION = "partition"
    NONE = "none"


def sequences(order: Order) -> SequenceOf:
    """The function that names a record's sequence."""
    return {Order.KEY: _by_key, Order.PARTITION: _by_partition, Order.NONE: _alone}[order]


def _by_key(record: Record) -> bytes:
    return sequence_of_key(record.key) if record.key is not None else _by_partition(record)


def _by_partition(record: Record) -> bytes:
    return sequence_of_partition(*record.partition)


def _alone(record: Record) -> bytes:
    return sequence_of_record(*record.partition, record.offset)
