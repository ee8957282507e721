"""The inbox: remembers, in the transaction of the effects, which events a consumer has applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_Key = tuple[Any, str, str]
_SQL = blocks("consumer")


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
    """For each event of a claim: whether it is new, and whether it is new but its sequence has open letters."""

    fresh: Sequence[bool]
    blocked: Sequence[bool]


class Inbox(NamedTuple):
    """The inbox of one consumer.

    An event is known by (consumer, tenant, service, idempotency key). Events without a key of their own are known by
    their UUIDv7, so that old rows can go by time; the others are kept beside them.

    ``idle_timeout`` (seconds): PostgreSQL ends a batch's transaction whose client was silent for so long, because a
    paused process would otherwise keep its inbox rows locked and the new owner of its partitions waiting.
    """

    consumer_id: int
    idle_timeout: float = 30.0

    async def claim(
        self, tx: Any, events: Sequence[RecordedEvent], sequences: Sequence[bytes], lane: LaneCount = NO_LANE
    ) -> Claim:
        """Enter events in the transaction ``tx``, and look for open letters afterwards (decision 0007).

        The second of two equal events of one call is not new. Also makes the commit wait for the disk.

        Args:
            sequences: of each event, what it stays in order with.
            lane: counts the batch; complete it at its end.

        Raises:
            LeaseLost: the database was set back to an earlier moment. Roll ``tx`` back.
        """
        ids, keys = _distinct(events)
        places = [*ids.values(), *keys.values()]
        columns = (*_columns(ids), *_columns(keys), [sequences[place] for place in places])
        silence = f"{int(self.idle_timeout * 1000)}ms"
        fresh, blocked = (await fetch(tx, _SQL["claim"], (self.consumer_id, *lane, silence, *columns)))[0]
        if fresh is None and blocked is None and len(places) == len(events):
            return Claim((True,) * len(events), (False,) * len(events))
        new = set(places) if fresh is None else {places[number - 1] for number in fresh}
        waits = {places[number - 1] for number in blocked or ()}
        every = range(len(events))
        return Claim(tuple(place in new for place in every), tuple(place in waits for place in every))


def known_by_id(event: RecordedEvent) -> bool:
    """Whether the inbox knows the event by its UUIDv7, not by a key that a caller gave."""
    return event.event_id.version == 7 and event.idempotency_key == str(event.event_id)


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
    return [list(column) for column in zip(*wanted, strict=True)] if wanted else [[], [], []]


async def consumer_id(pool: Pool, name: str) -> int:
    """The number of a consumer, made when it is first seen."""
    known = await pool.fetch(_SQL["find"], name)
    if not known:
        known = await pool.fetch(_SQL["register"], name)
    return int(known[0][0])
