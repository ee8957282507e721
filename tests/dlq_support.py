"""What the tests of dead letters share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

from soma_common.dlq.failures import Failure, Stage
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import FullLetter, Known, Lease, RawRecord, sequence_of
from soma_common.dlq.store import DeadLetters, Undelivered
from soma_common.events.ids import uuid7, uuid_text
from soma_common.events.models import RecordedEvent
from soma_common.inbox import Inbox, consumer_id
from soma_common.postgres.pool import Pool
from tests.core_support import recorded

OFFSETS = count(1)


class Claimed(NamedTuple):
    """For each event of a claim: whether it is new, and whether it is new but its sequence has open letters."""

    fresh: Sequence[bool]
    blocked: Sequence[bool]


def fresh_event(**fields: Any) -> RecordedEvent:
    """A recorded event known by its own id."""
    event_id = uuid7()
    return recorded({"n": 1}, **({"event_id": event_id, "idempotency_key": uuid_text(event_id)} | fields))


def undelivered(key: str | bytes | None = "a", *, event: RecordedEvent | None = None, **fields: Any) -> Undelivered:
    """A record of a key with an event of its own."""
    given = {"topic": "orders", "partition": 0, "offset": next(OFFSETS), "value": b'{"n": 1}'} | fields
    record = RawRecord(key=key.encode() if isinstance(key, str) else key, **given)
    return Undelivered(record=record, event=event or fresh_event(), sequence=sequence_of(record))


def failure(message: str = "it failed", stage: Stage = Stage.HANDLE) -> Failure:
    """What a handler that raised leaves."""
    try:
        raise ValueError(message)
    except ValueError as error:
        return Failure.of(stage, error, event_type="order.placed")


@dataclass(frozen=True)
class Desk:
    """One consumer's letters, and the operator's side of them."""

    pool: Pool
    consumer: int
    letters: DeadLetters
    dlq: DLQHandler

    @classmethod
    async def open(cls, pool: Pool, name: str = "billing") -> Desk:
        number = await consumer_id(pool, name)
        return cls(pool, number, DeadLetters(pool, Inbox(number, 5.0), f"consumer {name}"), DLQHandler(pool, who="ann"))

    async def park(self, *given: Undelivered, retry_in: float | None = None) -> list[bool]:
        return [await self.letters.park(each, failure(), attempts=3, retry_in=retry_in) for each in given]

    async def block(self, *given: Undelivered) -> bool:
        async with self.pool.transaction() as tx:
            return await self.letters.block(tx, given)

    async def claim(self, *given: Undelivered, tx: Any = None) -> Claimed:
        if tx is None:
            async with self.pool.transaction() as own:
                return await self.claim(*given, tx=own)
        inbox = Inbox(self.consumer)
        fresh, letters = await inbox.claim(tx, [each.event for each in given])  # type: ignore[misc]
        behind = await inbox.behind(tx, [each.sequence for each in given]) if letters else ()
        return Claimed(fresh, tuple(is_new and place in behind for place, is_new in enumerate(fresh)))

    async def lease(self, owner: str = "w", **given: Any) -> Lease:
        (lease,) = await self.letters.lease_due(owner, **given)
        return lease

    async def apply(self, lease: Lease, letter: FullLetter) -> str:
        async with self.pool.transaction() as tx:
            return await self.letters.resolve(tx, lease, letter)

    async def redrive(self) -> list[int]:
        """Apply everything that is due; the offsets in their order."""
        applied: list[int] = []
        while leases := await self.letters.lease_due("w"):
            outcome = "ready"
            while outcome == "ready":
                letters = await self.letters.letters(leases[0])
                assert letters
                for letter in letters:
                    outcome = await self.apply(leases[0], letter)
                    applied.append(letter.record.offset)
        return applied

    async def rows(self) -> list[tuple[int, str]]:
        """(offset, status) of every letter, in order."""
        found = await self.pool.fetch("SELECT record_offset, status FROM soma.dead_letters ORDER BY place")
        return [(row[0], row[1]) for row in found]

    async def sequences(self) -> int:
        return int((await self.pool.fetch("SELECT count(*) FROM soma.dead_sequences"))[0][0])

    async def id_of(self, one: Undelivered) -> UUID:
        sql = "SELECT letter_id FROM soma.dead_letters WHERE record_offset = $1"
        return UUID(int=(await self.pool.fetch(sql, one.record.offset))[0][0].int)


def offsets(given: Sequence[Undelivered]) -> list[int]:
    return [each.record.offset for each in given]


def known(letter: FullLetter) -> Known:
    return letter.letter.event
