"""Dead letters for a consumer: parking, blocking, and the re-drive of leased sequences (decision 0007)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from soma_common.dlq.failures import Failure, storable
from soma_common.dlq.mirror import Copied, Mirror
from soma_common.dlq.models import FullLetter, Known, Lease, RawRecord, Status
from soma_common.dlq.rows import FULL_LETTERS, full_letter_of, identities, record_columns
from soma_common.errors import LeaseLost, LetterChanged
from soma_common.events.ids import uuid7
from soma_common.events.models import RecordedEvent
from soma_common.inbox import Inbox, LaneCount
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_MOST_CLAIMED: Final = 2600  # bytes of an event's names that fit into a row of an index, whose limit is 2704
_PAGE_BYTES: Final = 16 * 1024 * 1024  # of values in memory at once: a hundred large ones could end the process


class Outcome(StrEnum):
    """What a settled letter leaves of its sequence.

    ``ready``: the next letter may be tried at once, under the same lease. ``waiting``: the lease has ended; the first
    letter is dead or not due. ``closed``: no open letter is left.
    """

    READY = "ready"
    WAITING = "waiting"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Undelivered:
    """A record that cannot be applied now, with its event (None: it could not be decoded) and its sequence."""

    record: RawRecord
    sequence: bytes
    event: RecordedEvent | None = None


class DeadLetters:
    """The letters of one consumer.

    Args:
        pool: connections to the database with the inbox and the effects.
        inbox: the consumer's inbox.
        who: the name in the history of what this consumer does by itself.
        consumer, mirror: its name, and what copies its letters to Kafka; None: nothing does.
    """

    def __init__(self, pool: Pool, inbox: Inbox, who: str, *, consumer: str = "", mirror: Mirror | None = None) -> None:
        self._pool, self._inbox, self._who = pool, inbox, storable(who, 512)
        self._consumer, self._mirror = consumer, mirror
        self._consumer_id = inbox.consumer_id
        self._sql = blocks("dead_letters")

    async def park(
        self, failed: Undelivered, failure: Failure, *, attempts: int, retry_in: float | None = None,
        automatic_left: int = 0, lane: LaneCount | None = None,
    ) -> bool:  # fmt: skip
        """Write the letter of an event that failed for good; whether it was new. Commits by itself.

        Not new: somebody applied or parked it, and there is nothing left to do. The call may be repeated when its
        outcome is unknown.

        Args:
            attempts: how often it was tried so far.
            retry_in: seconds until its first automatic try; None: it is dead.
            automatic_left: automatic tries that are left.
            lane: counts this transaction too.

        Raises:
            InfrastructureError, TransactionConflict: nothing was written, or it is unknown: call again.
            LeaseLost: the lane is not where its worker knows it.
        """
        async with self._pool.transaction(bound=SHORT) as tx:
            if lane is not None:
                await lane.begin(tx)
            written = await self._park(tx, failed, failure, (attempts, retry_in, automatic_left))
            if lane is not None:
                await lane.complete(tx)
            return written

    async def _park(
        self, tx: Any, failed: Undelivered, failure: Failure, numbers: tuple[int, float | None, int]
    ) -> bool:
        if failed.event is not None and _can_be_claimed(failed.event):
            claim = await self._inbox.claim(tx, [failed.event])
            if not claim.fresh[0]:
                return False
        retry_in = numbers[1]
        await fetch(tx, self._sql["lock_sequence"], (self._consumer_id, failed.sequence, retry_in))
        status = Status.DEAD if retry_in is None else Status.RETRYING
        written = await self._write(tx, [failed], status, failure, numbers)
        if written and self._mirror is not None:
            await self._mirror.write(tx, Copied(
                letter_id=UUID(int=written[0].int), consumer=self._consumer, status=status, record=failed.record,
                event=Known.of(failed.event), failure=failure, attempts=numbers[0],
            ))  # fmt: skip
        if not written:  # the record has a letter: if that is settled, the row just made has no letter
            await fetch(tx, self._sql["advance"], (self._consumer_id, failed.sequence))
        return bool(written)

    async def block(self, tx: Any, waiting: Sequence[Undelivered]) -> bool:
        """Write events behind the open letters of their sequences, in the batch's transaction, in the given order.

        False: a sequence was settled meanwhile. Nothing was written; roll the batch back and try it again.
        """
        wanted = list({each.sequence for each in waiting})
        if not wanted:
            return True
        locked = await fetch(tx, self._sql["lock_open"], (self._consumer_id, wanted))
        if len(locked) < len(wanted):
            return False
        await self._write(tx, waiting, Status.BLOCKED, None, (0, None, 0))
        return True

    async def _write(
        self, tx: Any, entries: Sequence[Undelivered], status: Status, failure: Failure | None,
        numbers: tuple[int, float | None, int],
    ) -> list[UUID]:  # fmt: skip
        columns = record_columns([(uuid7(), e.sequence, e.record, Known.of(e.event)) for e in entries])
        told = (
            (failure.stage.value, failure.error_type, failure.message, failure.stack, failure.fingerprint)
            if failure is not None
            else (None,) * 5
        )
        args = (self._consumer_id, *columns, status.value, *told, *numbers, self._who)
        written = [row[0] for row in await fetch(tx, self._sql["write_letters"], args)]
        if len(written) < len(entries):
            await fetch(tx, self._sql["know_letters"], (self._consumer_id, *identities(columns)))
        return written

    async def lease_due(self, owner: str, *, most: int = 1, seconds: float = 30.0) -> list[Lease]:
        """Lease sequences whose first letter is due, longest waiting first, for so many seconds.

        What another worker holds is passed over. A worker that dies loses its leases when they end.
        """
        args = (self._consumer_id, most, storable(owner, 512), seconds)
        async with self._pool.transaction(bound=SHORT) as tx:
            rows = await fetch(tx, self._sql["lease_due"], args)
        return [Lease(self._consumer_id, bytes(row[0]), UUID(int=row[1].int), owner, row[2], row[3]) for row in rows]

    async def renew(self, lease: Lease, *, seconds: float = 30.0) -> Lease:
        """Hold a lease for so many seconds from now.

        Raises:
            LeaseLost: it had ended.
        """
        args = (self._consumer_id, lease.sequence, lease.token, seconds)
        rows = await self._pool.fetch(self._sql["renew_lease"], *args)
        if not rows:
            raise LeaseLost("The lease of this sequence of dead letters has ended.")
        return replace(lease, until=rows[0][0])

    async def release(self, lease: Lease) -> None:
        """Give a sequence back before its lease ends; another worker may take it at once. Safe to call twice."""
        await self._pool.fetch(self._sql["release_lease"], self._consumer_id, lease.sequence, lease.token)

    async def rest(self, lease: Lease, *, seconds: float) -> None:
        """As ``release``, but nobody takes the sequence for so many seconds; those that are due go first."""
        args = (self._consumer_id, lease.sequence, lease.token, seconds)
        await self._pool.fetch(self._sql["rest_lease"], *args)

    async def letters(self, lease: Lease, *, most: int = 100) -> list[FullLetter]:
        """The next letters of a leased sequence, in the order in which they must be applied.

        They end before a letter that is dead or not due yet, and when their values are 16 MiB and more. None come when
        the lease was lost.
        """
        args = (self._consumer_id, lease.sequence, lease.token, most, _PAGE_BYTES)
        return [full_letter_of(row) for row in await self._pool.fetch(FULL_LETTERS + self._sql["of_lease"], *args)]

    async def resolve(self, tx: Any, lease: Lease, *letters: FullLetter) -> Outcome:
        """Mark letters of a sequence as applied, at the end of the transaction ``tx`` that holds their effects.

        Raises:
            LeaseLost: another worker may have the sequence. Roll ``tx`` back.
            LetterChanged: one was discarded or edited meanwhile. Roll ``tx`` back, and take the letters again.
        """
        ids, revisions = [each.letter.letter_id for each in letters], [each.letter.revision for each in letters]
        args = (self._consumer_id, lease.sequence, lease.token, ids, revisions, self._who)
        return _outcome((await fetch(tx, self._sql["resolve"], args))[0][0], letters[0])

    async def fail(
        self, lease: Lease, letter: FullLetter, failure: Failure, *, retry_in: float | None = None,
        automatic_left: int | None = None,
    ) -> Outcome:  # fmt: skip
        """A try failed (its transaction was rolled back): tried again after ``retry_in`` seconds, or (None) dead.

        ``automatic_left``: automatic tries that are left; None leaves the number as it is. Commits by itself.

        Raises:
            LeaseLost, LetterChanged: nothing was written; the letter is somebody else's matter.
        """
        known = letter.letter
        fence = (self._consumer_id, lease.sequence, lease.token, known.letter_id, known.revision, self._who)
        told = (failure.stage.value, failure.error_type, failure.message, failure.stack, failure.fingerprint)
        async with self._pool.transaction(bound=SHORT) as tx:
            said = (await fetch(tx, self._sql["fail"], (*fence, retry_in, automatic_left, *told)))[0][0]
            return _outcome(said, letter)


def _can_be_claimed(event: RecordedEvent) -> bool:
    """Whether the inbox can hold its names. A foreign event may have failed for the very reason that it cannot."""
    names = (event.tenant_id, event.service_id, event.idempotency_key)
    if any(storable(name, len(name) * 4) != name for name in names):
        return False
    return sum(len(name.encode()) for name in names) <= _MOST_CLAIMED


def _outcome(said: str, letter: FullLetter) -> Outcome:
    if said == "lost":
        raise LeaseLost("The lease of this sequence of dead letters has ended.")
    if said == "changed":
        raise LetterChanged(f"Letter {letter.letter.letter_id} was settled, discarded or edited meanwhile.")
    return Outcome(said)
