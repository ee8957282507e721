"""The micro-batch: inbox, effects and new events in one transaction; on an error, whose fault it was."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from soma_common.consumer.blocking import Handled
from soma_common.consumer.effects import ENDING, Blamed, Effects
from soma_common.consumer.gate import Gate
from soma_common.consumer.lanes import Again, Lane
from soma_common.consumer.order import SequenceOf
from soma_common.consumer.retries import ErrorClass, RetryPolicy, stage_of
from soma_common.consumer.source import Partition, Place, Record
from soma_common.consumer.spans import HandlerSpans
from soma_common.consumer.tally import Tally
from soma_common.dlq.alerts import Alerts
from soma_common.dlq.failures import Failure
from soma_common.dlq.models import Known, LetterNotice, RawRecord, Status
from soma_common.dlq.store import DeadLetters, Undelivered
from soma_common.errors import (
    ClockAhead,
    DeadLetterRefused,
    HandlerTimeout,
    InfrastructureError,
    LeaseLost,
    OffsetLost,
    SomaError,
    TransactionConflict,
    UnhandledType,
)
from soma_common.inbox import Inbox
from soma_common.postgres.errors import is_from_driver
from soma_common.retry import Backoff

log = logging.getLogger(__name__)

# Nobody's fault but the world's: the consumer begins again at its stored positions.
PASSING: Final = (InfrastructureError, TransactionConflict, ClockAhead)
CONFLICTED: Final = Backoff(base=0.005, maximum=1.0)  # waits of a transaction that met another one
MOST_CONFLICTS: Final = 20
GROWTH: Final = 4  # after a failure a transaction takes one, then so many times more as long as all goes well

Begin = Callable[[], AbstractAsyncContextManager[Any]]
Settle = Callable[[Iterable[Record]], None]


class _Reopened(Exception):
    """Letters of a sequence were settled between the claim and the lock: look again."""


class _Tries(NamedTuple):
    """How often an event failed, and how often something was away when it was tried."""

    failures: int = 0
    outages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the pipeline of a consumer works with.

    Args:
        begin: opens a transaction: ``async with begin() as tx``.
        raw: a record as it came.
        refuse_unknown: an event type without a handler is an error.
        alerts: are told of letters.
    """

    consumer: str
    begin: Begin
    inbox: Inbox
    letters: DeadLetters
    effects: Effects
    retry: RetryPolicy
    sequence_of: SequenceOf
    raw: Callable[[Record], RawRecord]
    refuse_unknown: bool = False
    alerts: Alerts


class Memory:
    """What a consumer remembers of events that fail, as long as it runs: over the sessions of its worker."""

    def __init__(self) -> None:
        self.tries: dict[Place, _Tries] = {}
        self.condemned: dict[Place, Exception] = {}
        self.alone: set[Place] = set()
        self.begun: set[Place] = set()  # by this process in single file
        self.halted: dict[Partition, OffsetLost] = {}  # why; those count that the source halts

    def condemn(self, record: Record, error: Exception) -> None:
        """The next time the record becomes a letter without being handled."""
        self.condemned[record.place] = error

    def hung(self, records: Sequence[Record], error: HandlerTimeout) -> None:
        """A handler of these hangs and cannot be ended. One alone is condemned; of several, each is tried alone."""
        if len(records) == 1:
            self.condemn(records[0], error)
        else:
            self.alone.update(record.place for record in records)

    def any_alone(self, records: Sequence[Record]) -> bool:
        """Whether one of these is to be tried alone."""
        return bool(self.alone) and any(record.place in self.alone for record in records)

    def settled(self, place: Place) -> None:
        """Nothing more is to be remembered of a record."""
        self.condemned.pop(place, None)
        self.alone.discard(place)
        self.tries.pop(place, None)

    def __bool__(self) -> bool:
        return bool(self.tries or self.condemned or self.alone)


class Pipeline:
    """Applies batches of one consumer and decides what becomes of events that fail.

    Args:
        settle: is told of records for which nothing is left to do.
    """

    def __init__(self, parts: Parts, gate: Gate, tally: Tally, memory: Memory, settle: Settle) -> None:
        self._p, self.gate, self.tally, self._memory, self._settle = parts, gate, tally, memory, settle
        self._waiting: dict[Place, str] = {}
        self._spans = HandlerSpans(parts.consumer)

    @property
    def away(self) -> str | None:
        """What handlers wait for, by the event that failed last."""
        return next(reversed(self._waiting.values()), None)

    def forget(self, partitions: Collection[Partition]) -> None:
        """They are not ours any more: nothing of them waits here."""
        self._waiting = {place: told for place, told in self._waiting.items() if place[0] not in partitions}

    async def apply(self, lane: Lane, batch: Sequence[Record]) -> Sequence[Again]:
        """Settle a batch as far as it goes; returns what is to be tried again, followers included.

        Raises:
            InfrastructureError, ClockAhead: begin again at the stored positions. The outcome of the transaction may be
                unknown; the inbox decides.
            LeaseLost: the database was set back; begin again.
            DeadLetterRefused: an event failed and its letter could not be written.
        """
        again: dict[bytes, list[Again]] = {}
        await self._part(lane, batch, again)
        return [each for waiting in again.values() for each in waiting]

    async def _part(self, lane: Lane, records: Sequence[Record], again: dict[bytes, list[Again]]) -> bool:
        """Commit the records, or find the event that is to blame in O(log n) transactions; whether none was.

        When a handler raised, its event is the suspect: what lies before it commits at once and it is tried alone.
        The suspect may be innocent (an earlier handler swallowed a database error), so only an event that fails
        alone is blamed. One that only ever meets conflicts alone has failed too: others would wait for it without end.
        """
        records = self._without_followers(records, again)
        if len(records) > 1 and self._memory.any_alone(records):
            return await self._in_halves(lane, records, again)
        conflicts = 0
        for attempt in range(MOST_CONFLICTS):
            if not records:
                return True
            try:
                async with self.gate:
                    await self._commit(lane, records)
                self._done(records)
                return True
            except _Reopened:
                continue
            except TransactionConflict as conflict:
                self.tally.conflicts += 1
                self.gate.conflict()
                if len(records) > 1:
                    break
                conflicts += 1
                if conflicts == MOST_CONFLICTS:
                    await self._failed(lane, records[0], conflict, again)
                    return False
                await asyncio.sleep(CONFLICTED.delay(attempt))
            except Blamed as blamed:
                lane.check()
                if blamed.place == 0 or len(records) == 1:  # the first had nobody before it who could be to blame
                    await self._failed(lane, records[0], blamed.cause, again)
                    await self._behind(lane, records[1:], again)
                elif blamed.place is None:
                    await self._in_halves(lane, records, again)
                else:
                    await self._part(lane, records[: blamed.place], again)
                    await self._behind(lane, records[blamed.place :], again)
                return False
        if len(records) == 1:
            raise TransactionConflict(f"Letters before {_named(records[0])} were settled {MOST_CONFLICTS} times.")
        return await self._in_halves(lane, records, again)

    async def _in_halves(self, lane: Lane, records: Sequence[Record], again: dict[bytes, list[Again]]) -> bool:
        middle = len(records) // 2
        first = await self._part(lane, records[:middle], again)
        return await self._part(lane, records[middle:], again) and first

    async def _behind(self, lane: Lane, records: Sequence[Record], again: dict[bytes, list[Again]]) -> None:
        """What begins with a suspect or lies behind a failure: one alone, then ever more as long as all goes well.

        So where every event fails, each is rolled back once or twice, not once for each that failed before it.
        """
        size = 1
        while records:
            well = await self._part(lane, records[:size], again)
            records, size = records[size:], size * GROWTH if well else 1

    def _without_followers(self, records: Sequence[Record], again: dict[bytes, list[Again]]) -> Sequence[Record]:
        """What follows an event of its sequence that is to be tried again waits behind it."""
        if not again:
            return records
        left = []
        for record in records:
            waiting = again.get(self._p.sequence_of(record))
            if waiting is None:
                left.append(record)
            else:
                waiting.append(Again(record, 0.0))
        return left

    async def _commit(self, lane: Lane, records: Sequence[Record]) -> None:
        """One transaction; raises Blamed when an event is to blame."""
        lane.check()
        handled = self._handled(records)
        if not handled:
            self.tally.skipped += len(records)
            return
        self.tally.transactions += 1
        lane.trying = records
        try:
            async with self._p.begin() as tx:
                applied, blocked, published = await self._apply(tx, lane, records, handled)
                settling = time.time_ns()
                counted = await lane.count.complete(tx)
        except (Blamed, LeaseLost, _Reopened, *PASSING, *ENDING) as error:
            blame, lane.blame = lane.blame, None
            raise (blame or error) from error.__cause__
        except Exception as error:
            blame, lane.blame = lane.blame, None
            if blame is not None:
                raise blame from error
            if isinstance(error, SomaError) or is_from_driver(error):
                raise Blamed(None, error) from error
            raise  # a fault of this library or of the source ends the worker: no event is blamed for it
        lane.count = counted
        if self._spans.active:
            self._spans.settled(records, [event for _, event, _ in handled], settling)
        self.gate.success()
        self.tally.applied += applied
        self.tally.blocked += blocked
        self.tally.published += published
        self.tally.repeated += len(handled) - applied - blocked
        self.tally.skipped += len(records) - len(handled)

    def _handled(self, records: Sequence[Record]) -> list[Handled]:
        """(place, event, handlers) of the records that have handlers; blames what nobody could handle."""
        of = self._p.effects.handlers.of
        handled: list[Handled] = []
        if self._memory:
            self._check_memory(records)
        for place, record in enumerate(records):
            if record.event is None:
                raise Blamed(place, record.error or ValueError("a record without event and error"))
            handlers = of(record.event.event_type)
            if handlers:
                handled.append((place, record.event, handlers))
            elif self._p.refuse_unknown:
                raise Blamed(place, UnhandledType(f"No handler takes {record.event.event_type}."))
        return handled

    def _check_memory(self, records: Sequence[Record]) -> None:
        for place, record in enumerate(records):
            condemned = self._memory.condemned.get(record.place)
            if condemned is not None:
                raise Blamed(place, condemned)

    async def _apply(
        self, tx: Any, lane: Lane, records: Sequence[Record], handled: Sequence[Handled]
    ) -> tuple[int, int, int]:
        claim = await self._p.inbox.claim(tx, [event for _, event, _ in handled], lane.count)
        fresh = [entry for entry, is_new in zip(handled, claim.fresh, strict=True) if is_new]
        waiting: list[Undelivered] = []
        if claim.letters:
            fresh, waiting = await self._sorted_out(tx, records, fresh)
        published = await self._p.effects.apply(tx, lane, fresh) if fresh else 0
        if waiting and not await self._p.letters.block(tx, waiting):
            raise _Reopened
        return len(fresh), len(waiting), published

    async def _sorted_out(
        self, tx: Any, records: Sequence[Record], fresh: Sequence[Handled]
    ) -> tuple[list[Handled], list[Undelivered]]:
        """Which of these new events may be applied, and which wait behind open letters."""
        sequences = [self._p.sequence_of(records[place]) for place, _, _ in fresh]
        behind = await self._p.inbox.behind(tx, sequences)
        free = [entry for number, entry in enumerate(fresh) if number not in behind]
        waiting = [
            Undelivered(record=self._p.raw(records[fresh[n][0]]), sequence=sequences[n], event=fresh[n][1])
            for n in sorted(behind)
        ]
        return free, waiting

    def _done(self, records: Sequence[Record]) -> None:
        if self._memory:
            for record in records:
                self._memory.settled(record.place)
                self._waiting.pop(record.place, None)
        self._settle(records)

    async def _failed(self, lane: Lane, record: Record, cause: Exception, again: dict[bytes, list[Again]]) -> None:
        """An event failed alone: it waits for its next try, or becomes a letter."""
        place = record.place
        known = self._memory.tries.get(place, _Tries())
        if self._p.retry.classify(cause) is ErrorClass.INFRASTRUCTURE:
            known = known._replace(outages=known.outages + 1)
            self._wait_for_world(place, cause)
        else:
            self._waiting.pop(place, None)
            known = known._replace(failures=known.failures + 1, outages=0)
            self.tally.timeouts += isinstance(cause, HandlerTimeout)
        failures = self._p.retry.tries if place in self._memory.condemned else known.failures
        self._memory.tries[place] = known
        following = self._p.retry.next(cause, stage_of(cause), failures, known.outages)
        if following.wait is not None:
            self.tally.retried += 1
            log.debug("%s is tried again in %.2f s: %s", _named(record), following.wait, cause)
            again[self._p.sequence_of(record)] = [Again(record, following.wait)]
            return
        await self._park(lane, record, cause, known.failures, (following.retry_in, following.left))
        self._done((record,))

    async def _park(
        self, lane: Lane, record: Record, cause: Exception, attempts: int, automatic: tuple[float | None, int]
    ) -> None:
        event_type = record.event.event_type if record.event is not None else None
        failed = Undelivered(record=self._p.raw(record), sequence=self._p.sequence_of(record), event=record.event)
        failure = Failure.of(stage_of(cause), cause, event_type=event_type)
        retry_in, left = automatic
        notice = LetterNotice(
            consumer=self._p.consumer, status=Status.DEAD if retry_in is None else Status.RETRYING,
            record=failed.record, event=Known.of(record.event), failure=failure, attempts=attempts, retry_in=retry_in,
        )  # fmt: skip
        try:
            new = await self._p.letters.park(
                failed, failure, attempts=attempts, retry_in=retry_in, automatic_left=left, lane=lane.count
            )
        except PASSING:
            self._p.alerts.tell(notice, doubtful=True)
            raise
        except (LeaseLost, *ENDING):
            raise
        except Exception as error:
            raise DeadLetterRefused(
                f"{_named(record)} failed ({type(cause).__name__}: {cause}); its letter could not be written: {error}",
                cure="mend the table soma.dead_letters; the consumer goes on exactly here.",
            ) from error
        lane.count = lane.count.following
        if not new:
            self.tally.repeated += 1
            return
        self._p.alerts.tell(notice)
        self.tally.refused += isinstance(cause, UnhandledType)
        if retry_in is None:
            self.tally.dead += 1
            log.error("%s is dead: %s: %s", _named(record), failure.error_type, failure.message, exc_info=cause)
        else:
            self.tally.parked += 1
            log.warning(
                "%s is parked, next try in %.0f s: %s: %s",
                _named(record), retry_in, failure.error_type, failure.message, exc_info=cause,
            )  # fmt: skip

    def _wait_for_world(self, place: Place, cause: Exception) -> None:
        told = getattr(cause, "message", None) or str(cause) or type(cause).__name__
        if self.away is None:
            log.warning("A handler waits: %s", told)
        self._waiting[place] = told


def _named(record: Record) -> str:
    where = f"{record.partition} at {record.offset}"
    if record.event is None:
        return f"The record with key {(record.key or b'')[:200]!r} of {where}"
    return f"Event {record.event.event_id} ({record.event.event_type}) of key {record.event.stream}, {where},"
