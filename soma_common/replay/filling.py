"""A rebuild's transactions: events into the new tables, several keys at once, each key in order."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from soma_common.consumer.blocking import Handled
from soma_common.consumer.effects import ENDING, Blamed, Effects
from soma_common.consumer.gate import Gate
from soma_common.consumer.handlers import Delivery
from soma_common.consumer.lanes import Lane
from soma_common.consumer.pipeline import CONFLICTED, MOST_CONFLICTS, PASSING, Begin
from soma_common.errors import LeaseLost, ReplayRefused, SomaError, TransactionConflict
from soma_common.inbox import Inbox, LaneCount
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.pool import fetch
from soma_common.replay.applying import failed, sequence_of
from soma_common.replay.mirror import Item, Part
from soma_common.replay.models import Counts, Progress
from soma_common.replay.projection import Shadow
from soma_common.sql.loader import blocks
from soma_common.tracing.conventions import replaying
from soma_common.tracing.tracer import TransactionTracer

# Mails were sent when the events were live, and what handlers published then is in the log.
REBUILDING: Final = Delivery(replaying=True, external_effects=False)


class Filling:
    """Applies what is settled to the new tables of one run.

    Effects and inbox rows commit together; the cursor follows when a whole page is applied. A page that is read again
    finds what was applied in the run's own inbox. Lanes count their batches (decision 0007), so that a database that
    was set back is noticed before the cursor passes what is gone.

    Args:
        begin: how a transaction begins that handlers work in.
        silence: seconds after which PostgreSQL ends a transaction whose process fell silent.
    """

    def __init__(
        self, begin: Begin, effects: Effects, run: Progress, shadow: Shadow, lanes: Sequence[LaneCount], silence: float
    ) -> None:
        self._begin, self._effects, self._run, self._shadow = begin, effects, run, shadow
        self._tracer = TransactionTracer()
        self._inbox = Inbox(run.inbox_id, silence)
        self._lanes = [Lane(count, 1, sequence_of) for count in lanes]
        self._gate = Gate(len(self._lanes))

    async def apply(self, items: Sequence[Item]) -> Counts:
        """Apply them all; when this returns, they have committed.

        Raises:
            HandlerFailed: an event failed when it was tried alone. What lies before it in its lane is applied.
            ReplayRefused: a handler wrote to a table that is not the projection's.
            LeaseLost, InfrastructureError, TransactionConflict, ClockAhead: go on from the stored cursor.
        """
        shares: list[list[Item]] = [[] for _ in self._lanes]
        for item in items:
            shares[zlib.crc32(item.sequence) % len(shares)].append(item)
        work = [self._share(lane, share) for lane, share in zip(self._lanes, shares, strict=True) if share]
        results = await asyncio.gather(*work, return_exceptions=True)  # none goes on when this returns
        for error in sorted(filter(_is_error, results), key=_gravity):
            raise error  # type: ignore[misc]  # filtered
        return sum((counts for counts in results if isinstance(counts, Counts)), Counts())

    async def _share(self, lane: Lane, items: Sequence[Item]) -> Counts:
        """What one lane has to do: in one transaction, or in halves until it is clear which event is to blame."""
        for attempt in range(MOST_CONFLICTS):
            try:
                async with self._gate:
                    counts = await self._commit(lane, items)
                self._gate.success()
                return counts
            except TransactionConflict:
                self._gate.conflict()
                await asyncio.sleep(CONFLICTED.delay(attempt))
            except Blamed as blamed:
                if isinstance(blamed.cause, PASSING):  # something that a handler needs is away
                    raise blamed.cause from blamed
                if len(items) == 1:
                    raise failed(items[0].record, blamed.cause) from blamed.cause
                cuts = (len(items) // 2,) if blamed.place is None else (blamed.place, blamed.place + 1)
                counts = Counts()
                for start, end in zip((0, *cuts), (*cuts, len(items)), strict=True):
                    if start < end:
                        counts += await self._share(lane, items[start:end])
                return counts
        raise TransactionConflict(f"A batch of a rebuild met other transactions {MOST_CONFLICTS} times.")

    async def _commit(self, lane: Lane, items: Sequence[Item]) -> Counts:
        try:
            with self._tracer.doing(replaying(self._run.consumer, self._run), root=True):
                async with self._begin() as tx:
                    args = (self._run.run_id, self._run.epoch, self._silence)
                    if not (await fetch(tx, blocks("rebuilds")["begin_batch"], args))[0][0]:
                        raise LeaseLost(f"Replay {self._run.run_id} was taken over, paused or cancelled.")
                    counts = await self.inside(tx, lane, items)
                    counted = await lane.count.complete(tx)
        except (Blamed, LeaseLost, ReplayRefused, *PASSING, *ENDING):
            raise
        except Exception as error:
            if isinstance(error, SomaError) or is_from_driver(error):
                raise Blamed(None, error) from error  # a deferred constraint, for one
            raise
        lane.count = counted
        return counts

    @property
    def _silence(self) -> str:
        return f"{int(self._inbox.idle_timeout * 1000)}ms"

    @property
    def lanes(self) -> Sequence[Lane]:
        """The lanes and how many batches each has committed."""
        return self._lanes

    async def inside(self, tx: Any, lane: Lane, items: Sequence[Item], *, silence: float | None = None) -> Counts:
        """Apply items in the transaction ``tx``, which began with the run held; raises Blamed for an event.

        ``silence`` (seconds) is that of this transaction, if it is another one.
        """
        inbox = self._inbox if silence is None else self._inbox._replace(idle_timeout=silence)
        fresh = await self._claimed(tx, items, inbox, lane.count)
        freed = await self._freed(tx, items)
        apply: list[Handled] = []
        hold, known, skipped = list[UUID](), 0, 0
        for place, item in enumerate(items):
            handlers = self._effects.handlers.of(item.record.event.event_type) if item.record.event is not None else ()
            if item.part is Part.HOLD:
                if item.letter is not None and (place in fresh or item.record.event is None):
                    hold.append(item.letter)
            elif not handlers:
                skipped += item.part is Part.APPLY
            elif place in fresh or (item.letter in freed and item.named):
                assert item.record.event is not None, "it has handlers"
                apply.append((place, item.record.event, handlers))
            else:
                known += item.part is Part.APPLY
        await self._effects.apply(tx, lane, apply, REBUILDING)
        if hold:
            await fetch(tx, blocks("rebuilds")["hold_letters"], (self._run.run_id, hold))
        await self._check_writes(tx)
        read = sum(item.part is not Part.FREE for item in items)
        held = sum(item.part is Part.HOLD for item in items)
        return Counts(read=read, applied=len(apply), repeated=known, skipped=skipped, held=held)

    async def _claimed(self, tx: Any, items: Sequence[Item], inbox: Inbox, lane: LaneCount) -> frozenset[int]:
        """Enter what is to be applied or held; the places of what was not there. A letter's own row is there."""
        places, events = [], []
        for place, item in enumerate(items):
            event = item.record.event
            if event is None or (item.part is Part.FREE and item.named):
                continue
            if item.part is Part.HOLD or self._effects.handlers.of(event.event_type):
                places.append(place)
                events.append(event)
        claim = await inbox.claim(tx, events, lane)
        return frozenset(place for place, is_new in zip(places, claim.fresh, strict=True) if is_new)

    async def _freed(self, tx: Any, items: Sequence[Item]) -> frozenset[UUID | None]:
        letters = [item.letter for item in items if item.part is Part.FREE]
        if not letters:
            return frozenset()
        rows = await fetch(tx, blocks("rebuilds")["free_letters"], (self._run.run_id, letters))
        return frozenset(UUID(int=row[0].int) for row in rows)

    async def _check_writes(self, tx: Any) -> None:
        """That handlers wrote to the new tables only: a name with a schema, or a forgotten table, is a live one."""
        rows = await fetch(tx, blocks("rebuilds")["written_elsewhere"], (self._shadow.schema,))
        if rows:
            raise ReplayRefused(
                f"A handler wrote to {', '.join(sorted(row[0] for row in rows))}, which this rebuild does not fill.",
                cure="name all tables of the consumer in the projection, and write to them by their bare names.",
            )


def _is_error(result: object) -> bool:
    return isinstance(result, BaseException)


def _gravity(error: object) -> int:
    """What no retry mends comes first."""
    return 1 if isinstance(error, (LeaseLost, *PASSING)) else 0
