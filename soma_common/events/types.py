"""The standard event types of the Soma stack (REQUIREMENTS 22); services add their own as plain strings."""

from __future__ import annotations

import re
from enum import StrEnum

from soma_common.errors import ValidationError

_NAME = re.compile(r"^[a-z][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*\Z")
MAX_TYPE_LENGTH = 200


class EventType(StrEnum):
    """Names of the events that every Soma service knows; the value is also the schema's name."""

    TXN_STARTED = "txn.started"
    TXN_COMMITTED = "txn.committed"
    TXN_FAILED = "txn.failed"
    TXN_COMPENSATING = "txn.compensating"
    TXN_ROLLED_BACK = "txn.rolled_back"
    SAGA_STARTED = "saga.started"
    SAGA_STEP_COMPLETED = "saga.step.completed"
    SAGA_STEP_FAILED = "saga.step.failed"
    SAGA_COMPLETED = "saga.completed"
    SAGA_COMPENSATING = "saga.compensating"
    MEMORY_STORED = "memory.stored"
    MEMORY_RECALLED = "memory.recalled"
    AGENT_TASK_STARTED = "agent.task.started"
    AGENT_TASK_COMPLETED = "agent.task.completed"
    COGNITIVE_STATE_CHANGED = "cognitive.state.changed"


def check_event_type(name: str) -> str:
    """The name itself, when it is dotted lower-case words such as ``order.placed``.

    Raises:
        ValidationError: empty, too long, or with other characters (the name becomes a schema's name).
    """
    if not isinstance(name, str) or len(name) > MAX_TYPE_LENGTH or not _NAME.fullmatch(name):
        raise ValidationError(
            f"{name!r:.80} is not an event type.",
            cure=f"use dotted lower-case words of at most {MAX_TYPE_LENGTH} characters, such as 'order.placed'.",
        )
    return str(name)
