"""Rows of dead letters as values, and values as a statement's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from soma_common.dlq.failures import Stage, storable
from soma_common.dlq.models import FullLetter, Known, Letter, RawRecord, Status
from soma_common.sql.loader import blocks

_SQL = blocks("dead_letters")
LETTERS: Final = f"{_SQL['columns']}\n{_SQL['source']}\n"
FULL_LETTERS: Final = f"{_SQL['columns']}\n{_SQL['content']}\n{_SQL['source']}\n"
_HEAD = 27  # columns of a letter without its bytes
_PLACE, _EVENT = slice(2, 5), slice(11, None)  # of record_columns: where a record is; its digest and its event


def letter_of(row: Sequence[Any]) -> Letter:
    """The letter in a row of ``LETTERS``."""
    (place, letter_id, consumer, sequence, status, stage, topic, partition, offset, event_id, event_type, tenant,
     service, idempotency_key, trace, error_type, message, fingerprint, attempts, next_at, left, edited_by, edited_at,
     revision, parked_at, changed_at, size) = row[:_HEAD]  # fmt: skip
    return Letter(
        place=place, letter_id=_plain(letter_id), consumer=consumer, sequence=bytes(sequence), status=Status(status),
        stage=Stage(stage) if stage else None, topic=topic, partition=partition, offset=offset,
        event=Known(event_id=_plain(event_id), event_type=event_type, tenant_id=tenant, service_id=service,
                    idempotency_key=idempotency_key, trace_id=_plain(trace)),
        error_type=error_type, message=message, fingerprint=fingerprint, attempts=attempts, next_at=next_at,
        automatic_left=left, edited_by=edited_by, edited_at=edited_at, revision=revision, parked_at=parked_at,
        changed_at=changed_at, size=size,
    )  # fmt: skip


def full_letter_of(row: Sequence[Any]) -> FullLetter:
    """The letter in a row of ``FULL_LETTERS``."""
    letter = letter_of(row)
    key, value, names, values, moment, message, stack, edited = row[_HEAD:]
    headers = tuple((bytes(n).decode("utf-8", "surrogateescape"), v) for n, v in zip(names, values, strict=True))
    record = RawRecord(
        topic=letter.topic, partition=letter.partition, offset=letter.offset, key=key, value=value, headers=headers,
        timestamp=moment,
    )  # fmt: skip
    return FullLetter(letter=letter, record=record, message=message, stack=stack, edited_value=edited)


def record_columns(entries: Sequence[tuple[UUID, bytes, RawRecord, Known]]) -> list[list[Any]]:
    """(letter id, sequence, record, what is known) as the columns of ``write_letters``."""
    headers = [header for _, _, record, _ in entries for header in record.headers]
    return [
        [letter_id for letter_id, _, _, _ in entries],
        [sequence for _, sequence, _, _ in entries],
        [storable(record.topic, 512) for _, _, record, _ in entries],
        [record.partition for _, _, record, _ in entries],
        [record.offset for _, _, record, _ in entries],
        [record.key for _, _, record, _ in entries],
        [record.value for _, _, record, _ in entries],
        [len(record.headers) for _, _, record, _ in entries],
        [_name(name) for name, _ in headers],
        [value for _, value in headers],
        [record.timestamp for _, _, record, _ in entries],
        [record.digest for _, _, record, _ in entries],
        [known.event_id for *_, known in entries],
        [known.event_type for *_, known in entries],
        [known.tenant_id for *_, known in entries],
        [known.service_id for *_, known in entries],
        [known.idempotency_key for *_, known in entries],
        [known.trace_id for *_, known in entries],
    ]


def identities(columns: Sequence[list[Any]]) -> list[list[Any]]:
    """Of these columns, those that say which records they are, and which events."""
    return [*columns[_PLACE], *columns[_EVENT]]


def _name(name: str) -> bytes:
    """A header's name as it was on the wire: bytes that were no UTF-8 come back as they were."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """Python's own UUID for a driver's."""
    return value if value is None or type(value) is UUID else UUID(int=value.int)
