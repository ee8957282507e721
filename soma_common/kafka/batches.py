"""Outbox rows as record batches, partition by partition."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from soma_common.events.keys import partition_of
from soma_common.outbox.publishing import (
    EVENT_ID,
    EVENT_TYPE,
    HEADERS,
    KEY,
    KEY_HASH,
    POSITION,
    TIMESTAMP_MS,
    TOPIC,
    VALUE,
    VERSION,
    Sending,
)
from soma_common.postgres.pool import Row

if TYPE_CHECKING:
    from aiokafka.producer.message_accumulator import BatchBuilder


@dataclass(slots=True)
class Batch:
    """Rows of one partition, as they are sent."""

    topic: str
    partition: int
    builder: BatchBuilder
    rows: Sequence[Row]
    error: BaseException | None = None
    acknowledged: bool = False


def batches_of(create: Callable[[], BatchBuilder], sending: Sending) -> Iterator[Batch]:
    """Batches, all partitions in turn, each with its rows in order."""
    lanes: dict[tuple[str, int], list[Row]] = {}
    for row in sending.rows:
        topic = row[TOPIC]
        place = (topic, partition_of(row[KEY_HASH], sending.partitions[topic]))
        lanes.setdefault(place, []).append(row)
    making = [_filled(create, place, rows, sending) for place, rows in lanes.items()]
    while making:
        for lane in list(making):
            batch = next(lane, None)
            if batch is None:
                making.remove(lane)
            else:
                yield batch


def _filled(
    create: Callable[[], BatchBuilder], place: tuple[str, int], rows: Sequence[Row], sending: Sending
) -> Iterator[Batch]:
    start, total = 0, len(rows)
    while start < total:
        builder = create()
        append, end = builder.append, start
        most = _portion(sending, rows, start) if sending.portions else total
        while end < total and end - start < most:
            row = rows[end]
            key, value, headers = _record(row)
            if append(timestamp=row[TIMESTAMP_MS], key=key, value=value, headers=headers) is None:
                break
            end += 1
        builder.close()
        yield Batch(*place, builder, rows[start:end])
        start = end


def _portion(sending: Sending, rows: Sequence[Row], start: int) -> int:
    """How many records the batch that begins here may have, so that suspects keep to themselves."""
    most = sending.portions.get(rows[start][POSITION])
    if most is not None:
        return most
    ahead = start
    while ahead < len(rows) and rows[ahead][POSITION] not in sending.portions:
        ahead += 1
    return ahead - start


_Record = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]


def _record(row: Row) -> _Record:
    """Key, value and headers as they are sent."""
    given = orjson.loads(row[HEADERS])
    if type(given.get("raw")) is list:  # a header of that name would be text
        return _verbatim(row, given)
    headers: list[tuple[str, bytes | None]] = [(name, value.encode()) for name, value in given.items()]
    headers.append(("event_id", str(row[EVENT_ID]).encode()))
    headers.append(("event_type", row[EVENT_TYPE].encode()))
    headers.append(("soma_version", b"%d" % row[VERSION]))
    headers.append(("soma_position", b"%d" % row[POSITION]))
    return row[KEY], row[VALUE], headers


def _verbatim(row: Row, given: dict[str, Any]) -> _Record:
    """A record that is sent as it is, as dlq/mirror.py writes it."""
    headers = [(name, None if value is None else b64decode(value)) for name, value in given["raw"]]
    nulls = given.get("null", ())
    key = b64decode(given["key"]) if "key" in given else row[KEY]
    return None if "key" in nulls else key, None if "value" in nulls else row[VALUE], headers
