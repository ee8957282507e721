"""The effects of events in one transaction: their handlers, in order, and what those publish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from typing import Any, Final, cast

from soma_common.ambient import AMBIENT
from soma_common.consumer.blocking import Handled, Run
from soma_common.consumer.handlers import (
    LIVE,
    BatchContext,
    Delivery,
    Handler,
    HandlerContext,
    Handlers,
    require_done,
)
from soma_common.consumer.lanes import Lane, Running, Work
from soma_common.consumer.retries import ErrorClass, RetryPolicy
from soma_common.consumer.spans import HandlerSpans
from soma_common.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    HandlerFailed,
    HandlerTimeout,
    LogError,
    MigrationError,
    SomaError,
    TransactionConflict,
)
from soma_common.events.models import Event, RecordedEvent
from soma_common.postgres.errors import sqlstate_of, translate
from soma_common.postgres.threads import ThreadTx

log = logging.getLogger(__name__)

Append = Callable[[Sequence[Event], Any], Awaitable[object]]

# Not an event's fault, and no retry mends it: the consumer ends with it.
ENDING: Final = (ConfigurationError, MigrationError, LogError)


class Blamed(Exception):
    """Applying failed because of an event: of the one at ``place`` as it seems, or (None) of some one."""

    def __init__(self, place: int | None, cause: Exception) -> None:
        self.place, self.cause = place, cause
        super().__init__(str(cause))


class Effects:
    """Calls the handlers of one consumer.

    Args:
        append: records new events in a transaction: ``await append(events, tx)``.
        retry: tells the errors of the world from those of an event.
        timeout: seconds that a handler may take.
    """

    def __init__(
        self, consumer: str, handlers: Handlers, append: Append, *, retry: RetryPolicy, timeout: float
    ) -> None:
        self._consumer, self.handlers, self._append = consumer, handlers, append
        self._retry, self._timeout = retry, timeout
        self._spans = HandlerSpans(consumer)

    async def apply(self, tx: Any, lane: Lane, handled: Sequence[Handled], delivery: Delivery = LIVE) -> int:
        """Run the handlers in the transaction ``tx``; how many events they published.

        ``handled`` are (place in the batch, event, its handlers). Raises Blamed, or what is nobody's fault.
        """
        collected: list[Event] = []
        lane.tx = tx
        before = AMBIENT.set(None)
        try:
            if self.handlers.blocking:
                await self._in_thread(tx, lane, handled, collected, delivery)
            elif self.handlers.batches:
                await self._in_runs(tx, lane, handled, collected, delivery)
            else:
                for place, event, handlers in handled:
                    context = HandlerContext(self._consumer, event, tx, collected, delivery)
                    await self._one(lane, handlers, place, context)
        finally:
            lane.work, lane.tx = Work(), None
            AMBIENT.reset(before)
        if collected:
            await self._record(lane, tx, collected)
        return len(collected)

    async def _in_runs(
        self, tx: Any, lane: Lane, handled: Sequence[Handled], collected: list[Event], delivery: Delivery
    ) -> None:
        """Events that follow each other and have the same handlers go together."""
        for handlers, group in groupby(handled, key=lambda entry: entry[2]):
            run = list(group)
            place = run[0][0] if len(run) == 1 else None
            for handler in handlers:
                if handler.batch:
                    await self._many(lane, handler, place, [event for _, event, _ in run], tx, collected, delivery)
                else:
                    for at, event, _ in run:
                        context = HandlerContext(self._consumer, event, tx, collected, delivery)
                        await self._one(lane, (handler,), at, context)

    async def _one(self, lane: Lane, handlers: Sequence[Handler], place: int, context: HandlerContext) -> None:
        lane.work.running = Running(time.monotonic(), place)
        AMBIENT.set(context.event)
        try:
            with self._spans.around(lane, (context.event,), place, context.delivery):
                for handler in handlers:
                    event = handler.prepared(context.event, self.handlers.typed)
                    await _call(handler, event, context)
        except asyncio.CancelledError:
            raise _overdue(lane, place) from None
        except Exception as error:
            raise self._meaning(lane, context.tx, place, error) from error
        _check_ended(lane, context.tx, place)

    async def _many(
        self,
        lane: Lane,
        handler: Handler,
        place: int | None,
        events: Sequence[RecordedEvent],
        tx: Any,
        collected: list[Event],
        delivery: Delivery,
    ) -> None:
        lane.work.running = Running(time.monotonic(), place)
        AMBIENT.set(events[0] if len(events) == 1 else None)
        try:
            with self._spans.around(lane, events, place, delivery):
                prepared = [handler.prepared(event, self.handlers.typed) for event in events]
                await _call(handler, prepared, BatchContext(self._consumer, events, tx, collected, delivery))
        except asyncio.CancelledError:
            raise _overdue(lane, place) from None
        except Exception as error:
            raise self._meaning(lane, tx, place, error) from error
        _check_ended(lane, tx, place)

    async def _in_thread(
        self, tx: ThreadTx, lane: Lane, handled: Sequence[Handled], collected: list[Event], delivery: Delivery
    ) -> None:
        """Handlers that are plain functions."""
        run = Run(self._consumer, self.handlers, lane, tx, collected, delivery, self._spans)
        working = tx.start(run, handled)
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            if lane.overdue is None or lane.given_up:  # in the latter case nobody watches it any more
                tx.terminate()
            else:
                tx.interrupt()
                await asyncio.wait({working})  # until the handler ends, or the watchdog leaves it behind
            raise _overdue(lane, None) from None
        try:
            working.result().get()
        except Exception as error:
            place = lane.work.running.place if lane.work.running else None
            raise self._meaning(lane, tx, place, error) from error

    async def _record(self, lane: Lane, tx: Any, events: Sequence[Event]) -> None:
        """Append what the handlers published; which of them is to blame for a refusal is not known."""
        try:
            await self._append(events, tx)
        except ENDING:
            raise
        except Exception as error:
            raise self._meaning(lane, tx, None, error) from error

    def _meaning(self, lane: Lane, tx: Any, place: int | None, error: Exception) -> Exception:
        """What an error in a handler is: late, a conflict, the loss of our connection, or the event's."""
        late = _late(lane)
        if late is not None:  # it made something else of its cancellation
            return late
        lost = tx.is_closed() or isinstance(translate(error), DatabaseUnavailable)
        took = lane.work.running.took if lane.work.running else 0.0
        if lost and took > self._timeout:  # nobody could cancel it (it blocked the process), and PostgreSQL hung up
            lane.blame = Blamed(place, HandlerTimeout(f"The handler worked for {took:.1f} s, and PostgreSQL hung up."))
            return DatabaseUnavailable("The connection to PostgreSQL was lost in a handler that took too long.")
        if tx.is_closed():
            return DatabaseUnavailable(f"The connection to PostgreSQL was lost in a handler: {_told(error)}.")
        # A handler's own OSError or TimeoutError is not the database's: only what PostgreSQL said counts.
        known = translate(error) if sqlstate_of(error) else None
        meant = known if isinstance(known, SomaError) else error
        if self._retry.classify(meant) is ErrorClass.CONFLICT:
            return meant if isinstance(meant, TransactionConflict) else TransactionConflict(_told(meant))
        named = isinstance(meant, HandlerFailed) or self._retry.classify(meant) is ErrorClass.INFRASTRUCTURE
        return Blamed(place, meant if named else error)


async def _call(handler: Handler, subject: Any, context: HandlerContext | BatchContext) -> None:
    said = await cast("Awaitable[object]", handler.handle(subject, context))
    if said is not None:
        require_done(said)


def _overdue(lane: Lane, place: int | None) -> BaseException:
    """What a cancellation in a handler means: it took too long, the batch is given up, or it is the handler's own."""
    late = _late(lane)
    if late is not None:
        return late
    task = asyncio.current_task()
    if task is None or task.cancelling():
        return asyncio.CancelledError()
    return Blamed(place, HandlerFailed("The handler was cancelled from within."))


def _late(lane: Lane) -> Blamed | None:
    """Whether a handler was cancelled for taking too long; from now on it is not, whatever it made of that."""
    running, lane.overdue = lane.overdue, None
    if running is None:
        return None
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
    late = HandlerTimeout(f"The handler did not end within {running.took:.1f} s.")
    # Kept in the lane as well: the rollback may find that PostgreSQL has hung up meanwhile.
    lane.blame = blamed = Blamed(running.place, late)
    return blamed


def _check_ended(lane: Lane, tx: Any, place: int | None) -> None:
    """A handler returned: in time, and with its transaction still open."""
    late = _late(lane)
    if late is not None:  # it swallowed its cancellation, and what was to follow did not happen
        raise late
    if not tx.is_in_transaction():
        log.error("A handler ended its transaction: what it committed of a replay is not undone.")
        raise Blamed(place, ConfigurationError("A handler ended the transaction of its batch.", cure=_KEEP_OPEN))


_KEEP_OPEN = "leave COMMIT and ROLLBACK to the consumer; use `async with ctx.tx.transaction()` for a savepoint."


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
