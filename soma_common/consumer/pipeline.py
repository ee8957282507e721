"""The micro-batch: inbox, effects, new events and position in one transaction; on an error, whose fault it was."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from soma_common.consumer.dedup import Inbox
from soma_common.consumer.handlers import LIVE, Delivery, Handler, HandlerContext, Handlers
from soma_common.consumer.source import Partition, Record, Source
from soma_common.errors import (
    ClockAhead,
    ConfigurationError,
    DatabaseUnavailable,
    HandlerFailed,
    InfrastructureError,
    LeaseLost,
    LogError,
    MigrationError,
    SomaError,
    TransactionConflict,
)
from soma_common.events.models import Event
from soma_common.postgres.errors import is_from_driver, translate
from soma_common.postgres.pool import Pool

log = logging.getLogger(__name__)

Append = Callable[[Sequence[Event], Any], Awaitable[object]]

# Nobody's fault but the world's: the batch is tried again.
PASSING: Final = (InfrastructureError, TransactionConflict, ClockAhead)
# Not an event's fault either, and no retry mends it: the consumer ends with it.
ENDING: Final = (ConfigurationError, MigrationError, LogError)


@dataclass(frozen=True, slots=True)
class Failure:
    """The event that stopped a partition."""

    partition: Partition
    offset: int
    error: HandlerFailed


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of records: ``applied`` by handlers, ``skipped`` for want of one, ``repeated`` and known already."""

    applied: int = 0
    skipped: int = 0
    repeated: int = 0
    published: int = 0
    transactions: int = 0
    failures: tuple[Failure, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.applied + other.applied,
            self.skipped + other.skipped,
            self.repeated + other.repeated,
            self.published + other.published,
            self.transactions + other.transactions,
            self.failures + other.failures,
        )


class Blamed(Exception):
    """Applying failed because of an event: of the one at ``place`` as it seems, or (None) of some one."""

    def __init__(self, place: int | None, cause: Exception) -> None:
        self.place, self.cause = place, cause
        super().__init__(str(cause))


class Pipeline:
    """Applies batches of one consumer.

    Args:
        append: records new events in a transaction: ``await append(events, tx)``.
        delivery: what handlers are told about how their events come.
    """

    def __init__(
        self, pool: Pool, consumer: str, handlers: Handlers, append: Append, *, delivery: Delivery = LIVE
    ) -> None:
        self._pool, self._consumer, self._handlers, self._append = pool, consumer, handlers, append
        self._delivery = delivery

    async def apply(self, source: Source, inbox: Inbox, batch: Sequence[Record]) -> Tally:
        """Apply a batch as far as it goes: a partition with a failing event stops before that event.

        Raises:
            InfrastructureError, TransactionConflict, ClockAhead: try again after ``source.rewind()``. The outcome of
                the transaction may be unknown; the stored position tells, and the inbox decides.
            LeaseLost: a partition was lost; nothing of the transaction took effect.
        """
        good, tally = _readable(source, batch)
        return tally + await self._settle(source, inbox, good)

    async def _settle(self, source: Source, inbox: Inbox, records: Sequence[Record]) -> Tally:
        """Commit the records, or find the event that is to blame by halving: O(log n) transactions.

        When a handler raised, its event is the suspect: what lies before it commits at once and it is tried alone.
        The suspect may be innocent (an earlier handler swallowed a database error), so only an event that fails
        alone is blamed.
        """
        if not records:
            return Tally()
        try:
            return await self._commit(source, inbox, records)
        except Blamed as blamed:
            if len(records) == 1:
                return Tally(transactions=1, failures=(_halt(source, records[0], blamed.cause),))
            place = blamed.place
        cuts = (len(records) // 2,) if place is None else (place, place + 1)
        tally = Tally(transactions=1)
        for start, end in zip((0, *cuts), (*cuts, len(records)), strict=True):
            part = [record for record in records[start:end] if record.partition not in source.halted]
            tally += await self._settle(source, inbox, part)
        return tally

    async def _commit(self, source: Source, inbox: Inbox, records: Sequence[Record]) -> Tally:
        """One transaction; raises Blamed when an event is to blame."""
        try:
            async with self._pool.connection() as tx, tx.transaction(isolation="read_committed"):
                tally = await self.effects(tx, inbox, records)
                await source.save(tx, records)
        except (Blamed, LeaseLost, *PASSING, *ENDING):
            raise
        except Exception as error:
            if isinstance(error, SomaError) or is_from_driver(error):
                raise Blamed(None, error) from error
            raise  # a fault of this library or of the source ends the worker: no event is blamed for it
        await source.committed(records)
        return tally

    async def effects(self, tx: Any, inbox: Inbox, records: Sequence[Record]) -> Tally:
        """What the records do inside a transaction: inbox rows, handlers, new events. The caller commits.

        Raises:
            Blamed: an event is to blame; roll back.
            InfrastructureError, TransactionConflict, ClockAhead: try again.
        """
        handled = [
            (place, record.event, handlers)
            for place, record in enumerate(records)
            if record.event is not None and (handlers := self._handlers.of(record.event.event_type))
        ]
        fresh = await inbox.claim(tx, [event for _, event, _ in handled]) if handled else []
        collected: list[Event] = []
        for (place, event, handlers), is_new in zip(handled, fresh, strict=True):
            if is_new:
                await self._handle(
                    handlers, place, HandlerContext(self._consumer, event, tx, collected, self._delivery)
                )
        if collected:
            await self._record(tx, collected)
        applied = sum(fresh)
        return Tally(applied, len(records) - len(handled), len(handled) - applied, len(collected), 1)

    async def _record(self, tx: Any, events: Sequence[Event]) -> None:
        """Append what the handlers published; which of them is to blame for a refusal is not known."""
        try:
            await self._append(events, tx)
        except (*PASSING, *ENDING):
            raise
        except Exception as error:
            raise Blamed(None, error) from error

    async def _handle(self, handlers: Sequence[Handler], place: int, context: HandlerContext) -> None:
        event, tx = context.event, cast("Any", context.tx)
        try:
            for handler in handlers:
                await handler.handle(handler.prepared(event, self._handlers.typed), context)
        except Exception as error:
            passing = _passing(tx, error)
            if passing is not None:
                raise passing from error
            raise Blamed(place, error) from error
        if not tx.is_in_transaction():
            raise Blamed(place, ConfigurationError("A handler ended the transaction of its batch.", cure=_KEEP_OPEN))


_KEEP_OPEN = "leave COMMIT and ROLLBACK to the consumer; use `async with ctx.tx.transaction()` for a savepoint."


def _passing(tx: Any, error: Exception) -> SomaError | None:
    """The error in a handler as one that is retried, or None when the event is to blame.

    A handler's own OSError or TimeoutError is not the database's: only what PostgreSQL said counts, or that its
    connection is gone.
    """
    if isinstance(error, PASSING):
        return error
    if tx.is_closed():
        return DatabaseUnavailable(
            f"The connection to PostgreSQL was lost in a handler: {error or type(error).__name__}."
        )
    known = translate(error) if getattr(error, "sqlstate", None) else None
    return known if isinstance(known, PASSING) else None


def _readable(source: Source, batch: Sequence[Record]) -> tuple[list[Record], Tally]:
    """The records without those that could not be decoded and what lies behind them in their partitions."""
    if all(record.error is None for record in batch):
        return list(batch), Tally()
    good: list[Record] = []
    tally = Tally()
    for record in batch:
        if record.partition in source.halted:
            continue
        if record.error is None:
            good.append(record)
        else:
            tally += Tally(failures=(_halt(source, record, record.error),))
    return good, tally


def _halt(source: Source, record: Record, cause: Exception) -> Failure:
    """Stop a partition, loudly and once."""
    source.halt(record.partition)
    named = _named(record)
    error = HandlerFailed(
        f"{named} of {record.partition} at {record.offset} failed: {type(cause).__name__}: {cause}",
        cure="mend the handler or the event and restart the consumer; it goes on exactly here.",
    )
    error.__cause__ = cause
    log.error(
        "Consuming of %s stopped: %s", record.partition, error, exc_info=cause, extra={"soma_offset": record.offset}
    )
    return Failure(record.partition, record.offset, error)


def _named(record: Record) -> str:
    if record.event is None:
        return f"The record with key {(record.key or b'')[:200]!r}"
    return f"Event {record.event.event_id} ({record.event.event_type}) of key {record.event.stream}"
