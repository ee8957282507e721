"""What a rebuild does about dead letters: the same as the live consumer did.

An event whose letter is open or discarded has no effect in the live tables, and gets none in the new ones: it is
entered into the inbox and noted. When its letter is resolved later, by a re-drive into the live tables, its effect
follows in the new ones before any later event of its key. An edited letter has the effect of its edited value.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple
from uuid import UUID

from soma_common.consumer.source import Partition, Record
from soma_common.dlq.decoding import Decode, event_of
from soma_common.dlq.models import FullLetter, Status, sequence_of_key, sequence_of_partition
from soma_common.dlq.rows import FULL_LETTERS, full_letter_of
from soma_common.errors import ReplayRefused
from soma_common.postgres.pool import Row, fetch
from soma_common.replay.models import Progress
from soma_common.sql.loader import blocks

MOST_FREED: Final = 500  # letters that are read at once


class Part(Enum):
    """What becomes of an event: it has its effect; it has none, and the inbox knows it; it has it after all."""

    APPLY = 1
    HOLD = 2
    FREE = 3


class Item(NamedTuple):
    """A record and its part. ``letter`` is the letter for ``HOLD`` and ``FREE``; ``named``: that knows its event."""

    record: Record
    part: Part = Part.APPLY
    letter: UUID | None = None
    named: bool = True

    @property
    def sequence(self) -> bytes:
        """What it stays in order with."""
        key, partition = self.record.key, self.record.partition
        return sequence_of_key(key) if key is not None else sequence_of_partition(*partition)


class Items(NamedTuple):
    """``freed`` come first, in the order of their letters. When there are any in the middle of a rebuild, ask again for
    the others after they are applied: only what one snapshot says of both keeps a key's order."""

    freed: list[Item]
    items: list[Item]


async def mirrored(connection: Any, run: Progress, records: Sequence[Record], decode: Decode) -> Items:
    """What becomes of records that the live consumer has settled, and of letters that were resolved meanwhile.

    Raises:
        ReplayRefused: a letter that was waited for was deleted: nobody knows what became of its event.
        InfrastructureError: an edited record's schema cannot be had now.
    """
    ids = [record.event.event_id for record in records if record.event is not None]
    bare = [(*record.partition, record.offset) for record in records if record.event is None]
    places = [list(column) for column in zip(*bare, strict=True)] if bare else [[], [], []]
    args = (run.run_id, run.scope.consumer_id, ids, *places, MOST_FREED)
    rows = await fetch(connection, blocks("rebuilds")["letters"], args)
    letters = await _full(connection, [row[1] for row in rows if row[0] or (row[6] == Status.RESOLVED and row[8])])
    freed = [await _freed(letters.get(_id(row[1])), decode) for row in rows if row[0]]
    by_event = {_id(row[2]): row for row in rows if not row[0] and row[2] is not None}
    by_place = {(row[3], row[4], row[5]): row for row in rows if not row[0] and row[2] is None}
    items = []
    for record in records:
        row = by_event.get(_id(record.event.event_id)) if record.event is not None else by_place.get(_place(record))
        items.append(await _item(record, row, letters, decode))
    return Items(freed, items)


async def _item(record: Record, row: Row | None, letters: dict[UUID, FullLetter], decode: Decode) -> Item:
    if row is None:
        return Item(record)
    if row[6] != Status.RESOLVED:
        return Item(record, Part.HOLD, _id(row[1]), named=row[2] is not None)
    if not row[8]:
        return Item(record)
    return Item(record._replace(event=await event_of(letters[_id(row[1])], decode), error=None))


async def _freed(letter: FullLetter | None, decode: Decode) -> Item:
    if letter is None:
        raise ReplayRefused(
            "A dead letter was deleted before this rebuild came to know what became of its event.",
            cure="cancel the rebuild and start again; keep letters until it is done.",
        )
    known = letter.letter
    event, place = await event_of(letter, decode), Partition(known.topic, known.partition)
    record = Record(place, known.offset, 0, None, event, key=letter.record.key)
    return Item(record, Part.FREE, known.letter_id, named=known.event.event_id is not None)


async def _full(connection: Any, ids: Sequence[UUID]) -> dict[UUID, FullLetter]:
    if not ids:
        return {}
    rows = await fetch(connection, FULL_LETTERS + blocks("rebuilds")["by_letters"], (list(ids),))
    return {letter.letter.letter_id: letter for letter in map(full_letter_of, rows)}


def _id(value: Any) -> UUID:
    """Python's own UUID for a driver's."""
    return value if type(value) is UUID else UUID(int=value.int)


def _place(record: Record) -> tuple[str, int, int]:
    return (*record.partition, record.offset)
