"""Letters that are due are applied again: whole sequences, in order, each letter exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from soma_common.consumer.effects import ENDING, Blamed
from soma_common.consumer.handlers import REDRIVEN
from soma_common.consumer.lanes import Lane, Work
from soma_common.consumer.pipeline import CONFLICTED, GROWTH, MOST_CONFLICTS, PASSING, Parts
from soma_common.consumer.retries import ErrorClass, stage_of
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Source
from soma_common.consumer.tally import Tally
from soma_common.dlq.decoding import event_of
from soma_common.dlq.failures import Failure, Stage
from soma_common.dlq.models import FullLetter, Lease, LetterNotice, Status
from soma_common.dlq.store import Outcome
from soma_common.errors import (
    DatabaseSetBack,
    HandlerTimeout,
    InfrastructureError,
    LeaseLost,
    LetterChanged,
    PoisonEvent,
    SomaError,
    TransactionConflict,
    UnhandledType,
    ValidationError,
)
from soma_common.events.models import RecordedEvent
from soma_common.inbox import LaneCount
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.shards import worker_name

log = logging.getLogger(__name__)

_IDENTITY = ("event_id", "tenant_id", "service_id", "idempotency_key", "aggregate_type", "aggregate_id")
_MOST_LEASES = 5  # owners of a sequence that may die over its first letter
_PAGE = 100
_BREATH = 0.05  # seconds after a try that found something away
_MOST_REMEMBERED = 10_000  # sequences


class _Away(Exception):
    """Something that a handler needs is away: the letter waits."""


@dataclass(slots=True)
class _Turn:
    """A lane with a leased sequence."""

    lane: Lane
    lease: Lease


class Redriver:
    """Re-drives the letters of one consumer.

    Several workers share the work by leases on sequences. A worker that dies loses its lease when that ends; when that
    happens again and again, the first letter of the sequence is buried as what kills them.
    """

    def __init__(
        self, parts: Parts, source: Source, settings: ConsumerSettings, tally: Tally, lanes: Sequence[LaneCount]
    ) -> None:
        self._p, self._source, self._settings, self._tally = parts, source, settings, tally
        self._owner = worker_name()
        self._seconds = settings.idle_timeout  # who is silent for longer has lost its transaction too
        self.lanes = [Lane(count, 1, parts.sequence_of) for count in lanes]
        self._outages: dict[bytes, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane in self.lanes:
                group.create_task(self._work(lane))

    async def _work(self, lane: Lane) -> None:
        while True:
            leases = await self._leased()
            if not leases:
                await asyncio.sleep(self._settings.redrive_every)
                continue
            turn = _Turn(lane, leases[0])
            await asyncio.sleep(await self._in_a_task(turn))

    async def _leased(self) -> Sequence[Lease]:
        """A sequence that is due; what a claim takes whose worker stops meanwhile is given back at once."""
        claim = asyncio.create_task(self._p.letters.lease_due(self._owner, most=1, seconds=self._seconds))
        try:
            return await asyncio.shield(claim)
        except asyncio.CancelledError:
            with suppress(*PASSING):
                for lease in await claim:
                    await self._p.letters.release(lease)
            raise

    async def _in_a_task(self, turn: _Turn) -> float:
        """The watchdog may cancel it; when the worker stops, the sequence is given back."""
        task = turn.lane.task = asyncio.create_task(self._sequence(turn))
        holding = asyncio.create_task(self._hold(turn))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            turn.lane.give_up(task)
            _, hanging = await asyncio.wait({task}, timeout=1.0)
            if not hanging:  # else the lease must end by itself: so it is counted against the letter
                with suppress(*PASSING):
                    await self._p.letters.release(turn.lease)
            raise
        finally:
            holding.cancel()
            turn.lane.task, turn.lane.work = None, Work()
        waits: float = task.result()
        return waits

    async def _hold(self, turn: _Turn) -> None:
        """Keep the lease as long as this process is alive; whether it was lost is asked where a letter is settled."""
        while True:
            await asyncio.sleep(self._seconds / 4)
            with suppress(LeaseLost, *PASSING):
                await self._p.letters.renew(turn.lease, seconds=self._seconds)

    async def _sequence(self, turn: _Turn) -> float:
        """The letters of a sequence, as far as they go; seconds to wait before the next sequence."""
        try:
            while letters := await self._p.letters.letters(turn.lease, most=_PAGE):
                if not await self._page(turn, letters):
                    return 0.0
            await self._p.letters.release(turn.lease)
        except DatabaseSetBack:
            raise
        except LeaseLost:
            log.debug("The lease of a sequence of dead letters was lost.")
        except _Away:
            await self._rest(turn.lease)
            return _BREATH
        return 0.0

    async def _rest(self, lease: Lease) -> None:
        """Something is away: the sequence waits, and others go first. What is away may concern this one alone."""
        if len(self._outages) >= _MOST_REMEMBERED:
            self._outages.clear()
        outages = self._outages[lease.sequence] = self._outages.get(lease.sequence, 0) + 1
        await self._p.letters.rest(lease, seconds=self._p.retry.away.delay(outages))

    async def _page(self, turn: _Turn, letters: Sequence[FullLetter]) -> bool:
        """Whether to read on in this sequence."""
        size = 1
        while letters:
            try:
                outcome = await self._part(turn, letters[:size])
            except LetterChanged:
                return True
            if outcome is None:
                size = 1
                continue
            if outcome is not Outcome.READY:
                return False
            turn.lease = replace(turn.lease, leases=1)
            letters, size = letters[size:], size * GROWTH
        return True

    async def _part(self, turn: _Turn, letters: Sequence[FullLetter]) -> Outcome | None:
        """Apply letters in one transaction; None when one of several fails: nothing happened, each is tried alone."""
        try:
            if turn.lease.leases > _MOST_LEASES:
                raise PoisonEvent(f"{turn.lease.leases - 1} workers ended while they re-drove this letter.")
            events = [await self._event(letter) for letter in letters]
            outcome = await self._applied(turn, letters, events)
        except InfrastructureError:
            raise
        except (Blamed, SomaError) as error:
            if isinstance(error, (LeaseLost, LetterChanged, *PASSING, *ENDING)):
                raise
            if len(letters) > 1:
                return None
            return await self._failed(turn, letters[0], error.cause if isinstance(error, Blamed) else error)
        self._outages.pop(turn.lease.sequence, None)
        self._tally.redriven += len(letters)
        return outcome

    async def _event(self, letter: FullLetter) -> RecordedEvent:
        try:
            event = await event_of(letter, self._source.decode)
        except InfrastructureError as error:
            raise _Away from error
        known = letter.letter.event.event_id
        if known is not None and event.event_id != known:
            raise ValidationError(f"The edited value is another event: {event.event_id}, not {known}.")
        if letter.edited_value is not None:
            await self._check_edited(letter, event)
        # What could not even be decoded may be of a type that this consumer passes over. Any other letter was to be
        # handled: without a handler it would be called resolved, and never have been applied.
        passed_over = letter.letter.stage is Stage.DECODE and not self._p.refuse_unknown
        if not passed_over and not self._p.effects.handlers.of(event.event_type):
            raise UnhandledType(
                f"No handler takes {event.event_type} now.",
                cure="run a consumer that has one and retry, or discard it.",
            )
        return event

    async def _check_edited(self, letter: FullLetter, event: RecordedEvent) -> None:
        """Under another name an event would be applied beside its own inbox row; under another key, out of order."""
        try:
            original = await self._source.decode(letter.record)
        except InfrastructureError as error:
            raise _Away from error
        except SomaError:
            return  # nobody knows what it was
        for name in _IDENTITY:
            was, now = getattr(original, name), getattr(event, name)
            if was != now:
                raise ValidationError(
                    f"The edited value is another event: its {name} is {now!r:.200}, not {was!r:.200}.",
                    cure="edit it again; or discard the letter and publish another event.",
                )

    async def _applied(self, turn: _Turn, letters: Sequence[FullLetter], events: Sequence[RecordedEvent]) -> Outcome:
        """Effects and the letters' end in one transaction; conflicts without end are a failure like any other."""
        of, conflicts = self._p.effects.handlers.of, 0
        while True:
            turn.lane.check()
            try:
                async with self._p.begin() as tx:
                    claim = await self._p.inbox.claim(tx, events, turn.lane.count)
                    # The inbox row of a letter is its own; of one that could not be decoded it may be another record's.
                    handled = [
                        (place, event, handlers)
                        for place, (letter, event) in enumerate(zip(letters, events, strict=True))
                        if (handlers := of(event.event_type))
                        and (claim.fresh[place] or letter.letter.event.event_id is not None)
                    ]
                    if handled:
                        turn.lane.trying = ()
                        published = await self._p.effects.apply(tx, turn.lane, handled, REDRIVEN)
                        self._tally.published += published
                    outcome = await self._p.letters.resolve(tx, turn.lease, *letters)
                    counted = await turn.lane.count.complete(tx)
                turn.lane.count = counted
                return outcome
            except TransactionConflict as conflict:
                self._tally.conflicts += 1
                conflicts += 1
                if len(letters) > 1 or conflicts == MOST_CONFLICTS:
                    raise Blamed(None, conflict) from conflict
                await asyncio.sleep(CONFLICTED.delay(conflicts - 1))
            except Exception as error:
                if is_from_driver(error):
                    raise Blamed(None, error) from error
                raise

    async def _failed(self, turn: _Turn, letter: FullLetter, cause: Exception) -> Outcome:
        """The letter waits for its next automatic try, or is dead."""
        if not isinstance(cause, HandlerTimeout):  # what else a handler makes of the end of its worker is no failure
            turn.lane.check()
        known = self._p.retry.classify(cause)
        if known is ErrorClass.INFRASTRUCTURE:
            raise _Away from cause
        failure = Failure.of(stage_of(cause), cause, event_type=letter.letter.event.event_type)
        # What only stood behind another letter has its automatic tries still before it.
        left = letter.letter.automatic_left if letter.letter.attempts else self._p.retry.parked.tries
        wait = None if known is ErrorClass.FATAL else self._p.retry.parked.delay(left)
        outcome = await self._p.letters.fail(
            turn.lease, letter, failure, retry_in=wait, automatic_left=max(0, left - 1) if wait is not None else 0
        )
        if wait is None:
            self._tally.dead += 1
            log.error("Letter %s is dead: %s: %s", letter.letter.letter_id, failure.error_type, failure.message)
            self._p.alerts.tell(self._notice(letter, failure))
        return outcome

    def _notice(self, letter: FullLetter, failure: Failure) -> LetterNotice:
        known = letter.letter
        return LetterNotice(
            consumer=self._p.consumer, status=Status.DEAD, record=letter.record, event=known.event, failure=failure,
            attempts=known.attempts + 1,
        )  # fmt: skip
