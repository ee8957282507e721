"""Reads the history back: journals, the log, fact rows, Kafka, effects, followers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition

from soma_common.events.codec import JsonCodec
from tests.torture.followers import journal_of
from tests.torture.history import Delivered, Effect, Followed, Known, Letter, Logged
from tests.torture.journal import read
from tests.torture.replayers import journal_of as replays_of
from tests.torture.settings import FOLLOW_UP, PARTITIONS, TOPIC

_LOG = """
SELECT event_id::text, tenant_id || ':' || aggregate_type || ':' || aggregate_id, version, "timestamp",
       coalesce((payload ->> 'fact')::boolean, false), coalesce((payload ->> 'follow')::boolean, false),
       CASE WHEN event_type = 'torture.answered' THEN causation_id END
FROM soma.events ORDER BY position
"""
_FACTS = "SELECT event_id::text FROM facts"
_EFFECTS = "SELECT event_id::text, key, version, previous FROM effects WHERE consumer = '{}' ORDER BY seq"
_LETTERS = """
SELECT c.name, l.status, coalesce(l.event_id::text, ''), coalesce(l.error_type, ''), l.edited_by IS NOT NULL,
       l.partition, l.record_offset, l.record_key, l.value, l.header_names, l.header_values
FROM soma.dead_letters l JOIN soma.consumers c USING (consumer_id) ORDER BY l.place
"""
_CODEC = JsonCodec()


def known(folder: Path, *, phase: str = "") -> Known:
    """What the writers (of one phase: names begin with it) know."""
    committed: set[str] = set()
    absent: set[str] = set()
    weak: set[str] = set()
    units: list[frozenset[str]] = []
    for path in folder.glob(f"{phase}*.writer.jsonl"):
        open_units: dict[str, dict[str, Any]] = {}
        for line in read(path):
            if line["s"] == "try":
                open_units[line["u"]] = line
                absent.update(line["x"])
            else:
                tried = open_units.pop(line["u"])
                (weak if tried["w"] else committed).update(line["ok"])
                absent.update(line["no"])
        units += [frozenset(tried["e"]) for tried in open_units.values() if tried["e"]]
    return Known(frozenset(committed), frozenset(absent), frozenset(weak), tuple(units))


def ended_after(folder: Path, moment: float) -> frozenset[str]:
    """Events that were acknowledged after a moment, or never."""
    return frozenset(_late(folder, moment))


def _late(folder: Path, moment: float) -> Iterator[str]:
    for path in folder.glob("*.writer.jsonl"):
        tried: dict[str, list[str]] = {}
        for line in read(path):
            if line["s"] == "try":
                tried[line["u"]] = line["e"]
            elif line["t"] < moment:
                tried.pop(line["u"])
        for events in tried.values():
            yield from events


async def log(dsn: str) -> list[Logged]:
    """Every event of the log, by position."""
    return [Logged(*row) for row in await _rows(dsn, _LOG)]


async def facts(dsn: str) -> list[str]:
    """The event of every fact row."""
    return [row[0] for row in await _rows(dsn, _FACTS)]


async def effects(dsn: str, consumer: str) -> list[Effect]:
    """Every effect of a consumer in the order of writing."""
    return [Effect(*row) for row in await _rows(dsn, _EFFECTS.format(consumer))]


async def letters(dsn: str) -> list[Letter]:
    """Every dead letter, in the order of parking."""
    rows = await _rows(dsn, _LETTERS)
    digests = [_digest(row[7], row[8], [(k.decode(), v) for k, v in zip(*row[9:11], strict=True)]) for row in rows]
    return [Letter(*row[:7], *digest) for row, *digest in zip(rows, digests, strict=True)]


async def count(dsn: str, table: str) -> int:
    """How many rows a table has."""
    return int((await _rows(dsn, f"SELECT count(*) FROM {table}"))[0][0])


async def _rows(dsn: str, sql: str) -> list[Any]:
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        return list(await connection.fetch(sql, timeout=120))
    finally:
        await connection.close()


def followed(folder: Path, names: Iterable[str]) -> dict[str, list[Followed]]:
    """What each follower met, in its order."""
    paths = {name: journal_of(folder, name) for name in names}
    return {
        name: [Followed(line["e"], line["k"], line["v"]) for line in read(path)] if path.exists() else []
        for name, path in paths.items()
    }


def replayed(folder: Path, name: str) -> tuple[int, int]:
    """How many replays a process brought to their end, and how many events they read."""
    path = replays_of(folder, name)
    lines = list(read(path)) if path.exists() else []
    return len(lines), sum(line["read"] for line in lines)


async def kafka(bootstrap: str, *, committed: bool = True, within: float = 120.0) -> list[Delivered]:
    """Every committed record of the topic, by partition and offset; or every record, aborted and open ones too."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level="read_committed" if committed else "read_uncommitted",
        enable_auto_commit=False,
        group_id=None,
    )
    await consumer.start()
    try:
        return await asyncio.wait_for(_read_all(consumer), within)
    finally:
        await consumer.stop()


async def ends(bootstrap: str) -> dict[int, int]:
    """The end offset of each partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=None)
    await consumer.start()
    try:
        found = await consumer.end_offsets([TopicPartition(TOPIC, n) for n in range(PARTITIONS)])
        return {place.partition: end for place, end in found.items()}
    finally:
        await consumer.stop()


async def _read_all(consumer: AIOKafkaConsumer) -> list[Delivered]:
    places = [TopicPartition(TOPIC, number) for number in range(PARTITIONS)]
    consumer.assign(places)
    await consumer.seek_to_beginning(*places)
    limits = await consumer.end_offsets(places)
    records: list[Delivered] = []
    while True:
        # The position also passes control records and aborted transactions, which are never handed out.
        if all([await consumer.position(place) >= limits[place] for place in places]):
            return sorted(records, key=lambda record: (record.partition, record.offset))
        for batch in (await consumer.getmany(timeout_ms=200, max_records=5000)).values():
            records += [_delivered(record) for record in batch]


def _delivered(record: Any) -> Delivered:
    headers = dict(record.headers)
    event = _CODEC.decode(record.value)
    return Delivered(
        event_id=str(event.event_id),
        key=str(event.stream),
        version=int(headers["soma_version"]),
        timestamp=event.timestamp,
        digest=_digest(record.key, record.value, record.headers),
        partition=record.partition,
        offset=record.offset,
        follow_up=event.event_type == FOLLOW_UP,
    )


def _digest(key: bytes, value: bytes, headers: Iterable[tuple[str, bytes]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (key, value, json.dumps([(name, what.decode()) for name, what in headers]).encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
