"""The dead-letter queue as applications and operators use it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID

from soma_common.dlq import careful, verbs
from soma_common.dlq.careful import Redrive, RedriveRules
from soma_common.dlq.failures import Failure, Stage
from soma_common.dlq.filters import LetterFilter, cursor_of
from soma_common.dlq.mirror import Mirror, MirrorSettings
from soma_common.dlq.models import (
    FullLetter,
    HistoryEntry,
    LetterPage,
    RawRecord,
    RedrivePolicy,
    Summary,
    sequence_of,
)
from soma_common.dlq.store import DeadLetters, Undelivered
from soma_common.errors import RedriveStopped, ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.inbox import Inbox, consumer_id
from soma_common.postgres.pool import Pool

Transform = Callable[[FullLetter], Any | Awaitable[Any]]


class DLQHandler:
    """Dead letters: capture, find, mend, try again, give up.

    A letter is tried again by the running consumer it belongs to, together with its whole sequence, in order.

    Args:
        pool: connections to the database with the letters.
        who: the name in the history of what is done through this object.
        policy: automatic tries of what is captured; without one a captured letter is dead at once.
        mirror: copies what is captured to a Kafka topic.
    """

    def __init__(
        self, pool: Pool, *, who: str, policy: RedrivePolicy | None = None, mirror: MirrorSettings | None = None
    ) -> None:
        self.pool, self.who, self.policy = pool, who, policy or RedrivePolicy(tries=0)
        self._mirror = Mirror(mirror) if mirror is not None else None

    async def capture_failed_event(
        self,
        consumer: str,
        record: RawRecord,
        error: BaseException,
        *,
        event: RecordedEvent | None = None,
        stage: Stage = Stage.HANDLE,
        attempts: int = 1,
        by_partition: bool = False,
    ) -> bool:
        """Keep an event that a consumer could not apply, byte for byte; whether it was new.

        Not new: it was applied or captured before. Later events of its sequence wait behind it.

        Args:
            consumer: its name; registered when it is new.
            event: the decoded event; None where decoding failed.
            attempts: how often it was tried.
            by_partition: the consumer orders by partition, not by key.

        Raises:
            InfrastructureError, TransactionConflict: it is not captured, or that is unknown: call again.
        """
        inbox = Inbox(await consumer_id(self.pool, consumer), idle_timeout=5.0)
        letters = DeadLetters(self.pool, inbox, self.who, consumer=consumer, mirror=self._mirror)
        failure = Failure.of(stage, error, event_type=event.event_type if event is not None else None)
        failed = Undelivered(record=record, event=event, sequence=sequence_of(record, by_partition=by_partition))
        left = self.policy.tries
        # What cannot be decoded will not be decodable in an hour: no automatic tries.
        delay = self.policy.delay(left) if stage not in (Stage.DECODE, Stage.VALIDATE) else None
        return await letters.park(
            failed,
            failure,
            attempts=attempts,
            retry_in=delay,
            automatic_left=max(0, left - 1) if delay is not None else 0,
        )

    async def list_dlq_events(
        self,
        wanted: LetterFilter | None = None,
        cursor: str | None = None,
        *,
        limit: int = 100,
        newest_first: bool = False,
        **conditions: Any,
    ) -> LetterPage:
        """A page of letters in the order of their parking; conditions are the fields of :class:`LetterFilter`.

        Raises:
            TenantRequired: without a tenant.
            ValidationError: a condition that does not exist, a cursor that no page gave, a limit outside 1..1000.
        """
        found = LetterFilter.of(wanted, conditions)
        return await verbs.find(self.pool, found, cursor=cursor, limit=limit, newest_first=newest_first)

    async def show(self, letter_id: UUID | str) -> FullLetter:
        """One letter with its record and the whole error.

        Raises:
            ValidationError, LetterNotFound: it is no id, or nobody's.
        """
        return await verbs.show(self.pool, letter_id)

    async def retry_event(
        self,
        letter_id: UUID | str,
        *,
        transform: Transform | None = None,
        why: str | None = None,
        raw: bool = False,
        dry_run: bool = False,
    ) -> bool:
        """Ask for another try of a letter's sequence; False when it was asked before or the letter is settled.

        Args:
            transform: gets the :class:`FullLetter`, whose ``value`` are the record's bytes: the whole envelope, not
                the payload. Returns the whole new value: the envelope as a dict, as JSON or in the consumer's own
                codec. With another payload, where the record is JSON:
                ``lambda letter: json.loads(letter.value) | {"payload": {…}}``. A consumer of Avro takes the envelope
                as JSON too; ``JsonCodec().encode(event, payload_json)`` writes it. It may be a coroutine function.
                The original stays, and ``who`` stands beside the edit.
            raw: take bytes that are no JSON in place of JSON.
            dry_run: only say whether something would be asked for; ``transform`` is not called.

        Raises:
            LetterNotFound: there is no such letter.
            LetterChanged: it was settled or edited while ``transform`` ran.
            ValidationError, EventTooLarge: what ``transform`` returned cannot be a value.
        """
        if dry_run:
            return await verbs.can_retry(self.pool, letter_id)
        if transform is not None:
            letter = await self.show(letter_id)
            value = transform(letter)
            if inspect.isawaitable(value):
                value = await value
            if value is None:
                raise ValidationError(
                    "transform returned None.", cure="return the new value: bytes, a dict or a model."
                )
            await self.edit(letter, value, why=why, raw=raw)
        return await verbs.retry(self.pool, letter_id, who=self.who, why=why)

    async def retry_many(
        self,
        wanted: LetterFilter | None = None,
        *,
        dry_run: bool = False,
        most: int | None = None,
        why: str | None = None,
        after: str | None = None,
        rules: RedriveRules | None = None,
        **conditions: Any,
    ) -> int:
        """Ask for another try of all dead and retrying letters that match; how many were marked.

        Whole sequences are marked, so that may be more than match. With ``dry_run`` nothing is marked, and the number
        is how many match. ``most`` bounds the matching letters, the oldest first. More than ``rules.ahead`` letters
        are only asked for as the first ones end: see :meth:`redrive`, which says what ``after`` is.

        Raises:
            TenantRequired, ValidationError: as ``list_dlq_events``.
            RedriveStopped: too many failed again, or nobody tries them.
        """
        if dry_run:
            count = await verbs.count_markable(self.pool, LetterFilter.of(wanted, conditions), cursor_of(after))
            return count if most is None else min(count, most)
        state = Redrive()
        async for step in self.redrive(wanted, most=most, why=why, after=after, rules=rules, **conditions):
            state = step
        if state.stopped is not None:
            raise RedriveStopped(
                f"The re-drive stopped after {state.marked} letters: {state.stopped}.",
                cure=f"mend what fails (fingerprints {', '.join(state.fingerprints) or 'none'}), then go on.",
            )
        return state.marked

    def redrive(
        self,
        wanted: LetterFilter | None = None,
        *,
        rules: RedriveRules | None = None,
        most: int | None = None,
        why: str | None = None,
        after: str | None = None,
        **conditions: Any,
    ) -> AsyncIterator[Redrive]:
        """As :meth:`retry_many`, step by step, watching what becomes of the letters: rate-limited, in bounded memory,
        and it stops by itself when the cause is not mended (the last state says so).

        When it is broken off, what was asked for stays so; call it again to go on. ``after`` is the cursor of an
        earlier state, to pass what failed again.
        """
        found = LetterFilter.of(wanted, conditions)
        return careful.redrive(self.pool, found, who=self.who, why=why, most=most, after=after, rules=rules)

    def retry_stream(
        self,
        wanted: LetterFilter | None = None,
        *,
        most: int | None = None,
        why: str | None = None,
        **conditions: Any,
    ) -> AsyncIterator[int]:
        """As :meth:`retry_many`, step by step: yields how many letters each small transaction marked.

        What was marked stays marked when the caller breaks off; calling it again goes on with the rest.
        """
        found = LetterFilter.of(wanted, conditions)
        return verbs.retry_many(self.pool, found, who=self.who, why=why, most=most)

    async def edit(
        self, letter: FullLetter, value: Any, *, why: str | None = None, raw: bool = False, dry_run: bool = False
    ) -> int:
        """Give an open letter another value for its next try; the original stays. Returns the new revision.

        Args:
            letter: as ``show`` returned it: an edit by somebody else in between is refused.
            value: the whole value of the record, as what ``transform`` of :meth:`retry_event` returns. Where the
                original is JSON, bytes must be JSON too, unless ``raw``.
            dry_run: only say what would be refused; returns the revision that there is.

        Raises:
            ValidationError, EventTooLarge: the value cannot be a record's.
            LetterNotFound, LetterChanged: it is gone, settled, or was edited meanwhile.
        """
        return await verbs.edit(self.pool, letter, value, who=self.who, why=why, raw=raw, dry_run=dry_run)

    async def discard(self, letter_id: UUID | str, reason: str) -> bool:
        """Give an open letter up for a reason; what stands behind it goes on. False when it was discarded before.

        Raises:
            ValidationError: no reason, or no id.
            LetterNotFound: there is no such letter.
            LetterChanged: it was resolved.
        """
        return await verbs.discard(self.pool, letter_id, who=self.who, reason=reason)

    async def summary(self, wanted: LetterFilter | None = None, **conditions: Any) -> list[Summary]:
        """Letters counted by consumer, status and fingerprint, each with oldest, newest and an example.

        Raises:
            TenantRequired, ValidationError: as ``list_dlq_events``.
        """
        return await verbs.summary(self.pool, LetterFilter.of(wanted, conditions))

    async def history(self, letter_id: UUID | str) -> list[HistoryEntry]:
        """What was done with a letter, oldest first."""
        return await verbs.history(self.pool, letter_id)
