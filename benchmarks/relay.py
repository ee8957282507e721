"""How fast the relay drains a full outbox, beside loops without any safety that send the same bytes.

    python -m benchmarks.relay --events 500000

(a) bare: fetch pages, create_batch, append, send_batch; no cursor, no order on failure, one worker.
(b) raw: create_batch, append, send_batch of rows that are in memory already; plain, and in transactions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import click

from soma_common.events.keys import StreamKey, kafka_key
from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings, _batches, _headers
from soma_common.outbox.groups import GROUPS
from soma_common.outbox.publishing import HEADERS, KEY, KEY_HASH, TIMESTAMP_MS, TOPIC, VALUE, Sending
from soma_common.outbox.relay import Relay
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks
from soma_common.testing.lane.kafka_wire import Topic
from soma_common.testing.run import ServerRun, apply_migrations

PARTITIONS = 6
KEYS = 10_000
VALUE_BYTES = 300


async def fill(dsn: str, topic: str, events: int, batch: int = 5000) -> None:
    """Append events with one call of soma.append per batch, each with keys of its own kind of load."""
    connection = await asyncpg.connect(dsn)
    begin = datetime.now(UTC) - timedelta(hours=1)
    headers = json.dumps({"content-type": "application/json", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"})
    for start in range(0, events, batch):
        numbers = range(start, min(events, start + batch))
        await connection.fetch(blocks("store")["append"], *_append_arguments(numbers, begin, topic, headers))
    await connection.execute("CHECKPOINT")
    await connection.close()


def _append_arguments(numbers: range, begin: datetime, topic: str, headers: str) -> list[Any]:
    size = len(numbers)
    names = sorted({f"k{number % KEYS}" for number in numbers})
    index = {name: place for place, name in enumerate(names, 1)}
    keys = [kafka_key(StreamKey("bench", "default", name)) for name in names]
    streams = [index[f"k{number % KEYS}"] for number in numbers]
    stamps = [begin + timedelta(microseconds=number) for number in numbers]
    first: dict[int, datetime] = {}
    last: dict[int, datetime] = {}
    counts: dict[int, int] = {}
    offsets = []
    for stream, stamp in zip(streams, stamps, strict=True):
        first.setdefault(stream, stamp)
        last[stream] = stamp
        counts[stream] = counts.get(stream, 0) + 1
        offsets.append(counts[stream])
    places = range(1, len(names) + 1)
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    value = [
        (b'{"n":%d,"text":"' % number).ljust(VALUE_BYTES - 2, b"abcdefghijklmnop"[number % 16 :][:1]) + b'"}'
        for number in numbers
    ]
    return [
        "bench", datetime.now(UTC), ["bench"] * len(names), ["default"] * len(names), names, [h for _, h in keys],
        [-2] * len(names), [counts[p] for p in places], [first[p] for p in places], [last[p] for p in places],
        streams, offsets, [uuid.uuid4() for _ in numbers], ["bench.done"] * size, [1] * size,
        ["c"] * size, [None] * size, None, [trace] * size, [None] * size, [None] * size, stamps, stamps,
        ["{}"] * size, ["{}"] * size, [topic] * size, [key for key, _ in keys], value, [headers] * size, False,
    ]  # fmt: skip
