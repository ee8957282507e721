"""The inbox: remembers, in the transaction of the effects, which events a consumer has applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_Key = tuple[Any, str, str]
_SQL = blocks("consumer")
_VARIANT: Final = frozenset("89ab")  # RFC 9562, 4.1


class LaneCount(NamedTuple):
    """A lane and how many batches it has committed, as far as its worker knows."""

    lane_id: int
    batches: int

    async def begin(self, tx: Any) -> None:
        """Count one more in the batch's transaction ``tx``, where no claim does; it must be completed.

        Raises:
            LeaseLost: the database was set back to an earlier moment. Roll ``tx`` back.
        """
        await fetch(tx, _SQL["count_batch"], self)

    async def complete(self, tx: Any) -> LaneCount:
        """The last statement of the batch's transaction ``tx``; what to know once it has committed.

        PostgreSQL refuses to commit a batch without it, so a COMMIT that a handler hides among its statements fails. It
        fails itself when the transaction is another one, or has failed before: a handler may have swallowed the error,
        and PostgreSQL would answer COMMIT with a silent ROLLBACK.

        Raises:
            HandlerFailed: a handler ended the transaction.
        """
        await fetch(tx, _SQL["complete_batch"], ())
        return self.following

    @property
    def following(self) -> LaneCount:
        """What to know once a batch that was begun here has committed."""
        return LaneCount(self.lane_id, self.batches + 1)


NO_LANE: Final = LaneCount(0, 0)  # of transactions that something else fences


class Claim(NamedTuple):
    """For each event of a claim whether it is new; and whether the consumer has open letters, of whatever sequence."""

    fresh: Sequence[bool]
    letters: bool


class Inbox(NamedTuple):
    """The inbox of one consumer.

    An event is known by (consumer, tenant, service, idempotency key). Events without a key of their own are known by
    their UUIDv7, so that old rows can go by time; the others are kept beside them.

    ``idle_timeout`` (seconds): PostgreSQL ends a batch's transaction whose client was silent for so long, because a
    paused process would otherwise keep its inbox rows locked and the new owner of its partitions waiting.
    """

    consumer_id: int
    idle_timeout: float = 30.0

    async def claim(self, tx: Any, events: Sequence[RecordedEvent], lane: LaneCount = NO_LANE) -> Claim:
        """Enter events in the transaction ``tx``. The second of two equal events of one call is not new.

        Whoever must not pass open letters asks ``behind`` afterwards, where there are any (decision 0007). Also makes
        the commit wait for the disk.

        Args:
            lane: counts the batch; complete it at its end.

        Raises:
            LeaseLost: the database was set back to an earlier moment. Roll ``tx`` back.
        """
        ids, keys = _distinct(events)
        places = [*ids.values(), *keys.values()]
        silence = f"{int(self.idle_timeout * 1000)}ms"
        args = (self.consumer_id, *lane, silence, *_columns(ids), *_columns(keys))
        fresh, letters = (await fetch(tx, _SQL["claim"], args))[0]
        if fresh is None and len(places) == len(events):
            return Claim((True,) * len(events), letters)
        new = set(places) if fresh is None else {places[number - 1] for number in fresh}
        return Claim(tuple(place in new for place in range(len(events))), letters)

    async def behind(self, tx: Any, sequences: Sequence[bytes]) -> frozenset[int]:
        """The places of the sequences that have open letters."""
        return frozenset(row[0] for row in await fetch(tx, _SQL["behind"], (self.consumer_id, list(sequences))))


def known_by_id(event: RecordedEvent) -> bool:
    """Whether the inbox knows the event by its UUIDv7, not by a key that a caller gave."""
    key = event.idempotency_key  # cheaper than UUID.version, which is computed: the version and the variant's digit
    return key[14:15] == "7" and key[19:20] in _VARIANT and key == str(event.event_id)


def _distinct(events: Sequence[RecordedEvent]) -> tuple[dict[_Key, int], dict[_Key, int]]:
    """The places where each id and each given key comes first."""
    ids: dict[_Key, int] = {}
    keys: dict[_Key, int] = {}
    for place, event in enumerate(events):
        if known_by_id(event):
            ids.setdefault((event.event_id, event.tenant_id, event.service_id), place)
        else:
            keys.setdefault((event.idempotency_key, event.tenant_id, event.service_id), place)
    return ids, keys


def _columns(wanted: dict[_Key, int]) -> list[list[Any]]:
    """Names, tenants and services; a column whose values are all alike as that one value."""
    if not wanted:
        return [[], [], []]
    names, tenants, services = (list(column) for column in zip(*wanted, strict=True))
    return [names, *(column[:1] if len(set(column)) == 1 else column for column in (tenants, services))]


async def consumer_id(pool: Pool, name: str) -> int:
    """The number of a consumer, made when it is first seen."""
    known = await pool.fetch(_SQL["find"], name)
    if not known:
        known = await pool.fetch(_SQL["register"], name)
    return int(known[0][0])
