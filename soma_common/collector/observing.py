"""The journals of choreographies, kept by one that takes no part: of what services announce."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from soma_common.errors import SagaDefinitionError
from soma_common.events.models import RecordedEvent
from soma_common.events.types import EventType
from soma_common.sagas.announcing import ANNOUNCED, SAGA_STREAM, Heard
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.ledger import Cause, Ledger


async def observe(event: RecordedEvent, tx: Any) -> None:
    """Write down what an announcement says, in the caller's transaction; of other events nothing."""
    if event.event_type not in ANNOUNCED or event.aggregate_type != SAGA_STREAM:
        return
    choreography = _choreography(event)
    heard = None if choreography is None else Heard.of(event, choreography.name, _id(choreography, event))
    if choreography is None or heard is None:
        return  # of a saga with a conductor, or of nobody
    ledger = await Ledger.open(tx, choreography, event)
    entry = _entry(event, heard, ledger)
    if entry is not None:
        turns = entry.what is What.TURNED
        cause = Cause(heard.step or heard.reason, error=heard.reason or None) if turns else None
        await ledger.write(entry, cause=cause)


def _choreography(event: RecordedEvent) -> Choreography | None:
    name: Any = event.payload.get("name") if isinstance(event.payload, dict) else None
    try:
        return Choreography(name)
    except SagaDefinitionError:  # none can be called so
        return None


def _id(choreography: Choreography, event: RecordedEvent) -> UUID:
    return choreography.saga_id(event.tenant_id, event.correlation_id)


def _entry(event: RecordedEvent, heard: Heard, ledger: Ledger) -> Entry | None:
    """What is new in it; an announcement may come twice, and several services may say the same."""
    match event.event_type:
        case EventType.SAGA_COMPENSATING:
            return None if ledger.turned else Entry(what=What.TURNED, who=heard.service, why=heard.reason or None)
        case EventType.SAGA_COMPLETED:
            ends = heard.outcome == "completed" and not ledger.turned and not ledger.ended
            return Entry(what=What.ENDED, who=heard.service) if ends else None
        case _:
            return _of_step(event, heard, ledger)


def _of_step(event: RecordedEvent, heard: Heard, ledger: Ledger) -> Entry | None:
    state = ledger.journal.of_step(heard.step)
    what = What.FAILED if event.event_type == EventType.SAGA_STEP_FAILED else What.DONE
    what = What.UNDONE if heard.undone else what
    if not heard.step or {What.FAILED: state.failed, What.DONE: state.done, What.UNDONE: state.undone}[what]:
        return None
    return Entry(
        what=what, step=heard.step, attempt=1, who=heard.service, took=heard.took,
        error_type=heard.error_type or None, error=heard.error or None,
    )  # fmt: skip
