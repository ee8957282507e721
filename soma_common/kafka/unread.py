"""What consumer groups have not read of a topic yet, by the offsets that they told Kafka."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from soma_common.consumer.source import Partition
from soma_common.kafka.admin import TopicAdmin
from soma_common.kafka.reader import TopicReader


class Unread(NamedTuple):
    """A group that has records before it in a partition: it stands at ``offset``, and they end before ``end``."""

    group: str
    partition: Partition
    offset: int
    end: int


async def unread(
    admin: TopicAdmin, reader: TopicReader, topic: str, partitions: int, *, without: Collection[str] = ()
) -> list[Unread]:
    """Where groups stand before the end of the first ``partitions`` partitions of a topic.

    A group counts once it has told Kafka an offset of the topic. What is left before it must hold a record: markers of
    transactions and aborted records are nothing to read.

    Args:
        without: groups that do not count.

    Raises:
        BrokerUnavailable: no broker answers.
        ReplayRefused: there is no such topic.
    """
    ranges = await reader.ranges([Partition(topic, number) for number in range(partitions)])
    found = []
    for group, told in sorted((await admin.committed(topic)).items()):
        for partition, (first, end) in ranges.items() if group not in without else ():
            offset = max(first, told.get(partition.number, first))
            if offset < end and await _holds_records(reader, partition, offset, end):
                found.append(Unread(group, partition, offset, end))
    return found


async def _holds_records(reader: TopicReader, partition: Partition, offset: int, end: int) -> bool:
    while offset < end:
        records, offset = await reader.read(partition, offset, end, 1)
        if records:
            return True
    return False
