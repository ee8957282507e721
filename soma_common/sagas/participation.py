"""One service's part in a choreography, as the handlers of a consumer: each event, in the consumer's transaction."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import orjson

from soma_common.consumer.handlers import Handle, Handler, HandlerContext, Handlers, Typed, require_done
from soma_common.consumer.pipeline import PASSING
from soma_common.dlq.failures import Failure, Stage
from soma_common.errors import SagaError
from soma_common.events.keys import MAX_PART_BYTES
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import MAX_PAYLOAD_BYTES, Payload, to_json
from soma_common.events.standard import SagaCompleted, SagaStepCompleted, SagaStepFailed
from soma_common.events.types import EventType
from soma_common.postgres.errors import sqlstate_of, translate
from soma_common.sagas.announcing import Heard, announced, compensating
from soma_common.sagas.choreography import Choreography, On, Reaction
from soma_common.sagas.context import SagaContext
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.ledger import Cause, Ledger
from soma_common.sagas.parameters import Call, Kind
from soma_common.sagas.values import decode, encode
from soma_common.tracing.conventions import stepping
from soma_common.tracing.tracer import TransactionTracer
from soma_common.tx import Tx

log = logging.getLogger(__name__)

_NO_COMPENSATION: Final = "it has no compensation"


class Participant:
    """One service's part in a choreography.

    Whatever goes wrong turns it: a step is refused, an event says so, another service says so. To turn is to write it
    down and to say so, no more; what is undone is undone when the service hears itself say so. So the turn stays even
    where a compensation fails, and no step runs behind it.

    Args:
        service: the service's id, which stands before the names of its steps.
        typed: gives events their typed payloads, upcasting older versions.
    """

    def __init__(self, choreography: Choreography, service: str, typed: Typed | None = None) -> None:
        self._choreography, self._service, self._typed = choreography, service, typed
        self._tracer = TransactionTracer()
        self._reactions = {self._path(reaction): reaction for reaction in choreography.reactions}

    def handlers(self) -> Handlers:
        """What a consumer needs to take this part."""
        handlers = Handlers(self._typed)
        for reaction in self._choreography.reactions:
            handlers.add(self._stepping(reaction), reaction.on)
        for event_type in sorted(self._choreography.fails_on):
            handlers.add(self._failed, event_type)
        for event_type in sorted(self._choreography.ends_on):  # behind the steps of the same event
            handlers.add(self._ended, event_type)
        handlers.add(self._heard_of_step, EventType.SAGA_STEP_COMPLETED, EventType.SAGA_STEP_FAILED)
        handlers.add(self._heard_of_turn, EventType.SAGA_COMPENSATING)
        handlers.add(self._heard_of_end, EventType.SAGA_COMPLETED)
        return handlers

    # What this service does.

    def _stepping(self, reaction: Reaction) -> Handle:
        async def step(event: RecordedEvent, ctx: HandlerContext) -> None:
            await self._step(reaction, event, ctx)

        return step

    async def _step(self, reaction: Reaction, event: RecordedEvent, ctx: HandlerContext) -> None:
        ledger, path = await self._open(ctx), self._path(reaction)
        if ledger.knows(path):
            log.info("%s: step %s runs once, and event %s is not its first.", ledger.saga_id, path, event.event_id)
            return
        if ledger.turned:
            await ledger.write(self._entry(What.SKIPPED, path, why="it failed before"))
            return
        begun, since = self._entry(What.BEGUN, path, result=_kept(ctx.event)), time.monotonic()
        try:
            async with ctx.tx.transaction():  # a savepoint: of a refused step nothing stays
                result, events = await self._run(reaction, event, ctx)
        except reaction.refusals as error:
            if _is_nobodys(error):
                raise
            await self._refused(ledger, reaction, begun, error, ctx)
            return
        took = time.monotonic() - since
        await ledger.write(begun, self._entry(What.DONE, path, result=result, took=took))
        ctx.publish(*events, self._done(ledger, reaction, ctx, took=took))

    async def _run(
        self, reaction: Reaction, event: RecordedEvent, ctx: HandlerContext
    ) -> tuple[bytes, Sequence[Event]]:
        """What a step returned, as JSON, and what it published."""
        given = {Kind.INPUT: event.payload, Kind.EVENT: ctx.event}
        value, events = await self._call(reaction.call, given, self._context(reaction, ctx), ctx)
        return encode(reaction.result, value, f"{self._choreography}, step {reaction.name}: the result"), events

    async def _refused(
        self, ledger: Ledger, reaction: Reaction, begun: Entry, error: Exception, ctx: HandlerContext
    ) -> None:
        path, failure = begun.step, Failure.of(Stage.HANDLE, error)
        failed = self._entry(
            What.FAILED, path, error_type=failure.error_type, error=failure.message, stack=failure.stack
        )
        payload = SagaStepFailed(
            saga_id=str(ledger.saga_id), name=self._choreography.name, step=path, step_number=reaction.number,
            error_type=failure.error_type, error=failure.message,
        )  # fmt: skip
        ctx.publish(self._announced(ledger, ctx, payload))
        cause = Cause(path, failure.error_type, failure.message)
        await self._turn(ledger, ctx, cause, begun, failed, failed_step=path)

    async def _failed(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        """An event came that says that all failed."""
        await self._turn(await self._open(ctx), ctx, Cause(event.event_type))

    async def _turn(
        self, ledger: Ledger, ctx: HandlerContext, cause: Cause, *before: Entry, failed_step: str = "", who: str = ""
    ) -> None:
        """From now on no step runs; and say so, to this service too. Once."""
        if ledger.turned:
            return
        why = cause.error or cause.reason
        await ledger.write(*before, self._entry(What.TURNED, why=why, who=who or self._service), cause=cause)
        name, tenant = self._choreography.name, ctx.event.tenant_id
        ctx.publish(compensating(name, ledger.saga_id, tenant, why, failed_step=failed_step))

    async def _undo(self, ledger: Ledger, ctx: HandlerContext) -> None:
        """Undo all that is done here, the newest first, in this transaction: all or nothing."""
        entries: list[Entry] = []
        for path in ledger.left_of(self._service):
            reaction = self._reactions.get(path)
            if reaction is None:
                raise SagaError(
                    f"{self._choreography}: step {path} of {ledger.saga_id} is done, and not declared any more.",
                    cure="declare it again, with its compensation, and retry this letter.",
                )
            if reaction.undo is None:
                entries.append(self._entry(What.UNDO_SKIPPED, path, why=_NO_COMPENSATION))
            else:
                entries.append(await self._compensate(ledger, reaction, path, ctx))
            ctx.publish(self._done(ledger, reaction, ctx, undone=True))
        if entries:
            await ledger.write(*entries)

    async def _compensate(self, ledger: Ledger, reaction: Reaction, path: str, ctx: HandlerContext) -> Entry:
        assert reaction.undo is not None
        since = time.monotonic()
        given = {
            Kind.INPUT: self._payload(reaction.on, await ledger.result(path, What.BEGUN), ctx.event),
            Kind.OWN: decode(reaction.result, await ledger.result(path, What.DONE)),
        }
        context = self._context(reaction, ctx, undoing=True)
        _, events = await self._call(reaction.undo, given, context, ctx)
        ctx.publish(*events)
        return self._entry(What.UNDONE, path, took=time.monotonic() - since)

    async def _ended(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        """An event came that says that all is done."""
        ledger = await self._open(ctx)
        if ledger.turned or ledger.ended:
            return
        await ledger.write(self._entry(What.ENDED, why=event.event_type))
        payload = SagaCompleted(saga_id=str(ledger.saga_id), name=self._choreography.name)
        ctx.publish(self._announced(ledger, ctx, payload))

    # What it hears of others, and of itself.

    async def _heard_of_step(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        heard = self._heard(ctx.event)
        if heard is None or heard.service == self._service:  # of its own it was written when it was said
            return
        what = What.FAILED if event.event_type == EventType.SAGA_STEP_FAILED else What.DONE
        what = What.UNDONE if heard.undone else what
        ledger = await self._open(ctx)
        state = ledger.journal.of_step(heard.step)
        if {What.FAILED: state.failed, What.DONE: state.done, What.UNDONE: state.undone}[what]:
            return
        await ledger.write(
            self._entry(
                what, heard.step, who=heard.service, took=heard.took, error_type=heard.error_type or None,
                error=heard.error or None,
            )
        )  # fmt: skip

    async def _heard_of_turn(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        heard = self._heard(ctx.event)
        if heard is None:
            return
        ledger = await self._open(ctx)
        if not ledger.turned:
            cause = Cause(heard.step or heard.reason, error=heard.reason or None)
            await self._turn(ledger, ctx, cause, failed_step=heard.step, who=heard.service)
        elif heard.service == self._service:
            await self._undo(ledger, ctx)

    async def _heard_of_end(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        heard = self._heard(ctx.event)
        if heard is None or heard.outcome != "completed" or heard.service == self._service:
            return
        ledger = await self._open(ctx)
        if not ledger.turned and not ledger.ended:
            await ledger.write(self._entry(What.ENDED, who=heard.service))

    def _heard(self, event: RecordedEvent) -> Heard | None:
        saga_id = self._choreography.saga_id(event.tenant_id, event.correlation_id)
        return Heard.of(event, self._choreography.name, saga_id)

    # How it does so.

    async def _open(self, ctx: HandlerContext) -> Ledger:
        return await Ledger.open(ctx.tx, self._choreography, ctx.event)

    async def _call(
        self, call: Call, given: dict[Kind, Any], context: SagaContext, ctx: HandlerContext
    ) -> tuple[Any, Sequence[Event]]:
        """What a function returns, and what it published, with the trace of its span."""
        tx = Tx(ctx.tx)
        filled = given | {Kind.TX: tx, Kind.CONTEXT: context}
        within = self._tracer.recorded() or context.trace  # the handler's span, which the event's trace led to
        with self._tracer.doing(stepping(context), parent=within) as trace:
            value = await call.function(**{name: filled[known.kind] for name, known in call.sources})
            require_done(value)
        return value, [replace(event, trace=event.trace or trace) for event in tx.pending]

    def _payload(self, on: On, kept: bytes | None, now: RecordedEvent) -> Any:
        """The payload of the event with which a step began, in the form in which the step took it."""
        known = orjson.loads(kept or b"{}")
        event = replace(now, **known)
        model = on if isinstance(on, type) and issubclass(on, Payload) else None
        return Handler(_nothing, event.event_type, model).prepared(event, self._typed).payload

    def _context(self, reaction: Reaction, ctx: HandlerContext, *, undoing: bool = False) -> SagaContext:
        event = ctx.event
        return SagaContext(
            saga_id=self._choreography.saga_id(event.tenant_id, event.correlation_id), saga=self._choreography.name,
            version=0, step=self._path(reaction), attempt=1, tenant_id=event.tenant_id,
            correlation_id=event.correlation_id, undoing=undoing, trace=event.trace,
        )  # fmt: skip

    def _done(
        self, ledger: Ledger, reaction: Reaction, ctx: HandlerContext, *, undone: bool = False,
        took: float | None = None,
    ) -> Event:  # fmt: skip
        payload = SagaStepCompleted(
            saga_id=str(ledger.saga_id), name=self._choreography.name, step=self._path(reaction),
            step_number=reaction.number, undone=undone, duration_ms=None if took is None else round(took * 1000, 3),
        )  # fmt: skip
        return self._announced(ledger, ctx, payload)

    def _announced(self, ledger: Ledger, ctx: HandlerContext, payload: Payload) -> Event:
        return announced(ledger.saga_id, ctx.event.tenant_id, payload)

    def _path(self, reaction: Reaction) -> str:
        return f"{self._service}/{reaction.name}"

    def _entry(self, what: What, step: str = "", *, who: str = "", **more: Any) -> Entry:
        return Entry(what=what, step=step, attempt=1 if step else 0, who=who or self._service, **more)


def _kept(event: RecordedEvent) -> bytes:
    """What a compensation may need of the event with which a step began; as recorded, so that it can be upcast."""
    kept = {"event_type": event.event_type, "schema_version": event.schema_version, "payload": event.payload}
    return to_json(f"Event {event.event_id}", kept, MAX_PAYLOAD_BYTES + MAX_PART_BYTES + 100)


def _is_nobodys(error: Exception) -> bool:
    """Whether an error is the world's, which no step may take for a refusal, however widely it named those."""
    return isinstance(translate(error) if sqlstate_of(error) else error, PASSING)


async def _nothing(event: object, ctx: object) -> None:
    """Stands where a handler has its function."""
