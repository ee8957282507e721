"""Commands that sagas send to other services, and how those answer: events, both of them.

@soma.handler("stock.reserve", consumer="stock")
async def reserve(event, ctx):
    ...
    ctx.publish(reply(event, {"hold": 7}))          # or: refusal(event, "out of stock")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson
from pydantic import JsonValue, TypeAdapter

from soma_common.errors import ValidationError
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.standard import SagaStepCompleted, SagaStepFailed
from soma_common.sagas.context import SagaContext

COMMANDS: Final = "soma.stack.saga.commands"
EVENTS: Final = "soma.stack.saga.events"
"""The topics of commands, and of what sagas and those who work for them tell (REQUIREMENTS 5)."""

_HEADER: Final = "saga"  # in the metadata of a command
_ANY: Final[TypeAdapter[Any]] = TypeAdapter(Any)


@dataclass(frozen=True, slots=True)
class Answer:
    """What another service answered: a result, or an error."""

    result: Any = None
    error_type: str | None = None
    error: str | None = None


def name_of(path: str) -> str:
    """The name of the signal as which the reply to a step comes."""
    return f"reply:{path}"


def command(event: Event, context: SagaContext, *, number: int) -> Event:
    """An event that says whom to answer.

    Raises:
        ValidationError: it is no event.
    """
    if not isinstance(event, Event):
        raise ValidationError(f"{event!r:.80} is no Event.", cure="return Event(payload=..., ...).")
    told = {
        "id": str(context.saga_id), "name": context.saga, "step": context.step, "number": number,
        "undo": context.undoing,
    }  # fmt: skip
    return replace(event, metadata={**event.metadata, _HEADER: told})


def is_command(event: Event) -> bool:
    """Whether a saga sends this event."""
    return _HEADER in event.metadata


def reply(command: RecordedEvent, result: Any = None) -> Event:
    """The event that answers a command: it is done. ``result`` is JSON, a model or a dataclass.

    Raises:
        ValidationError: no saga sent this command.
    """
    asked = _asked(command)
    value: JsonValue = _ANY.dump_python(result, mode="json")
    payload = SagaStepCompleted(
        saga_id=asked["id"], name=asked["name"], step=asked["step"], step_number=asked["number"], result=value
    )
    return _answering(command, asked, payload)


def refusal(command: RecordedEvent, error: str, *, error_type: str = "StepRefused") -> Event:
    """The event that answers a command: it cannot be done, and nothing of it was.

    Raises:
        ValidationError: no saga sent this command.
    """
    asked = _asked(command)
    payload = SagaStepFailed(
        saga_id=asked["id"], name=asked["name"], step=asked["step"], step_number=asked["number"], error=error,
        error_type=error_type,
    )  # fmt: skip
    return _answering(command, asked, payload)


def is_undo(command: RecordedEvent) -> bool:
    """Whether a command takes an earlier one back. It needs no reply."""
    return bool(_asked(command)["undo"])


def answer(payload: bytes) -> Answer:
    """What a signal with a reply says."""
    told = orjson.loads(payload)
    return Answer(told.get("result"), told.get("error_type"), told.get("error"))


def _answering(command: RecordedEvent, asked: Mapping[str, Any], payload: Any) -> Event:
    return Event(
        payload=payload, tenant_id=command.tenant_id, aggregate_type="saga", aggregate_id=asked["id"],
        correlation_id=command.correlation_id, causation_id=str(command.event_id), trace=command.trace,
    )  # fmt: skip


def _asked(command: RecordedEvent) -> Mapping[str, Any]:
    asked = command.metadata.get(_HEADER)
    if not isinstance(asked, Mapping) or not {"id", "name", "step", "number", "undo"} <= asked.keys():
        raise ValidationError(f"No saga sent event {command.event_id}.", cure="answer commands of sagas only.")
    return asked
