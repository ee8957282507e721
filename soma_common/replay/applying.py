"""A replay's batch: inbox, effects and the run's cursor in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from soma_common.consumer.effects import ENDING, Blamed, Effects
from soma_common.consumer.handlers import Delivery
from soma_common.consumer.lanes import Lane
from soma_common.consumer.pipeline import PASSING, Begin
from soma_common.consumer.source import Record
from soma_common.dlq.models import sequence_of_key, sequence_of_partition
from soma_common.errors import HandlerFailed, LeaseLost, SomaError
from soma_common.events.keys import kafka_key
from soma_common.events.models import RecordedEvent
from soma_common.inbox import NO_LANE, Claim, Inbox, LaneCount, known_by_id
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.pool import fetch
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import Counts, Progress
from soma_common.replay.reading import cursor_after
from soma_common.sql.loader import blocks
from soma_common.tracing.conventions import replaying
from soma_common.tracing.tracer import TransactionTracer

_MOST_CAUSE: Final = 2000  # characters of what a handler said


class ForcedInbox(Inbox):
    """An inbox that learns what is applied, and lets it be applied whether it knew it or not."""

    async def claim(self, tx: Any, events: Sequence[RecordedEvent], lane: LaneCount = NO_LANE) -> Claim:
        """Enter the events; each is new, except the second of two equal ones of this call."""
        claim = await Inbox.claim(self, tx, events, lane)
        known = [(e.event_id if known_by_id(e) else e.idempotency_key, e.tenant_id, e.service_id) for e in events]
        fresh = tuple(known.index(one) == place for place, one in enumerate(known))
        return claim._replace(fresh=fresh)


async def held_places(tx: Any, consumer_id: int, records: Sequence[Record]) -> frozenset[int]:
    """The places of the events that are left to the re-drive, which keeps the order: those with an open dead letter of
    their own, and those whose key or partition has one, whichever the consumer orders by.

    This is the one place where a replay asks about letters.
    """
    columns = zip(*((_id(record), sequence_of(record), _by_partition(record)) for record in records), strict=True)
    ids, keys, partitions = map(list, columns) if records else ([], [], [])
    rows = await fetch(tx, blocks("replays")["held"], (consumer_id, ids, keys, partitions))
    return frozenset(row[0] - 1 for row in rows)


class Batches:
    """Applies batches of a run; a failing event ends it, and what lies before it is applied."""

    def __init__(
        self, begin: Begin, checkpoints: Checkpoints, effects: Effects, inbox: Inbox, delivery: Delivery
    ) -> None:
        self._begin, self._checkpoints, self._effects, self._inbox = begin, checkpoints, effects, inbox
        self._delivery, self._lane = delivery, Lane(NO_LANE, 1, sequence_of)
        self._tracer = TransactionTracer()

    async def apply(self, run: Progress, records: Sequence[Record]) -> Counts:
        """Apply them all, or find the event that is to blame by halving.

        Raises:
            HandlerFailed: an event failed when it was tried alone; all before it are applied, and the cursor stands
                before it.
            LeaseLost: the run is not ours any more, or was paused or cancelled: nothing of the last transaction took
                effect.
            InfrastructureError, TransactionConflict, ClockAhead: try again from the stored cursor.
        """
        if not records:
            return Counts()
        try:
            return await self._commit(run, records)
        except Blamed as blamed:
            if isinstance(blamed.cause, PASSING):  # something that a handler needs is away: no event is to blame
                raise blamed.cause from blamed
            if len(records) == 1:
                raise failed(records[0], blamed.cause) from blamed.cause
            place = blamed.place
        cuts = (len(records) // 2,) if place is None else (place, place + 1)
        counts = Counts()
        for start, end in zip((0, *cuts), (*cuts, len(records)), strict=True):
            counts += await self.apply(run, records[start:end])
        return counts

    async def _commit(self, run: Progress, records: Sequence[Record]) -> Counts:
        """One transaction; raises Blamed when an event is to blame."""
        try:
            with self._tracer.doing(replaying(run.consumer, run), root=True):
                async with self._begin() as tx:
                    return await self._inside(tx, run, records)
        except (Blamed, LeaseLost, *PASSING, *ENDING):
            raise
        except Exception as error:
            if isinstance(error, SomaError) or is_from_driver(error):
                raise Blamed(None, error) from error  # a deferred constraint, for one
            raise

    async def _inside(self, tx: Any, run: Progress, records: Sequence[Record]) -> Counts:
        silence = f"{int(self._inbox.idle_timeout * 1000)}ms"
        await fetch(tx, blocks("readers")["guard_transaction"], (silence, None))  # handlers may take their time
        of, handled = self._effects.handlers.of, []
        for place, record in enumerate(records):
            if record.event is not None and (handlers := of(record.event.event_type)):
                handled.append((place, record.event, handlers))
        held = await held_places(tx, run.scope.consumer_id, [records[place] for place, _, _ in handled])
        free = [entry for place, entry in enumerate(handled) if place not in held]
        claim = await self._inbox.claim(tx, [event for _, event, _ in free])
        self._lane.trying = records
        fresh = [entry for entry, is_new in zip(free, claim.fresh, strict=True) if is_new]
        await self._effects.apply(tx, self._lane, fresh, self._delivery)
        bare = sum(record.event is None for record in records)  # undecodable: the live consumer made letters of them
        counts = Counts(
            read=len(records),
            applied=len(fresh),
            repeated=len(free) - len(fresh),
            skipped=len(records) - len(handled) - bare,
            held=len(held) + bare,
        )
        # Last: it locks the run's row, and whoever pauses or takes the run waits for this commit.
        await self._checkpoints.save(tx, run, cursor_after(records[-1]), counts)
        return counts


def sequence_of(record: Record) -> bytes:
    """What a record stays in order with: the key that it came with, or that the relay would give its event."""
    if record.key is not None:
        return sequence_of_key(record.key)
    assert record.event is not None
    return sequence_of_key(kafka_key(record.event.stream)[0])


def _by_partition(record: Record) -> bytes:
    return sequence_of_partition(*record.partition)


def _id(record: Record) -> UUID:
    assert record.event is not None, "it has handlers"
    return record.event.event_id


def failed(record: Record, cause: Exception) -> HandlerFailed:
    """The error that ends a run."""
    event = record.event
    assert event is not None
    return HandlerFailed(
        f"Event {event.event_id} ({event.event_type}) of key {event.stream} at {record.offset} failed: "
        f"{type(cause).__name__}: {_shown(str(cause))}",
        cure="mend the handler or the event and resume the replay; it goes on exactly here.",
    )


def _shown(text: str) -> str:
    """What a handler said, for logs and terminals: it may quote a payload."""
    cut = text if len(text) <= _MOST_CAUSE else text[:_MOST_CAUSE] + " [truncated]"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in cut)
