"""Payload models of the standard event types (REQUIREMENTS 22), for whoever publishes them by hand or reads them.

Fields are few and mean the same in every service; what a service knows besides goes into the event's metadata, or
into an event type of its own. Durations are in milliseconds. Texts of errors are for people; programs look at
``error_type``.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, JsonValue

from soma_common.events.payloads import Payload, PayloadModels
from soma_common.events.types import EventType


class TxnStarted(Payload, event_type=EventType.TXN_STARTED):
    """A business transaction began."""

    txn_id: str = Field(description="Names the transaction; the same in all its events.")
    name: str = Field(description="What it does, such as place-order.")
    participants: list[str] = Field(default_factory=list, description="Services that take part, where known.")


class TxnCommitted(Payload, event_type=EventType.TXN_COMMITTED):
    """A business transaction reached its end."""

    txn_id: str
    name: str
    duration_ms: float | None = Field(default=None, description="Since it started.")


class TxnFailed(Payload, event_type=EventType.TXN_FAILED):
    """A business transaction failed; compensation follows where there is any."""

    txn_id: str
    name: str
    error_type: str = Field(description="The class of the error.")
    error: str = Field(default="", description="The error's message.")
    duration_ms: float | None = Field(default=None, description="Since it started.")


class TxnCompensating(Payload, event_type=EventType.TXN_COMPENSATING):
    """The effects of a failed business transaction are being undone."""

    txn_id: str
    name: str
    reason: str = ""


class TxnRolledBack(Payload, event_type=EventType.TXN_ROLLED_BACK):
    """The effects of a failed business transaction are undone."""

    txn_id: str
    name: str
    reason: str = ""


class SagaStarted(Payload, event_type=EventType.SAGA_STARTED):
    """A saga began."""

    saga_id: str
    name: str = Field(description="The saga's definition.")
    definition_version: int = Field(default=1, description="The version of the definition.")
    steps: list[str] = Field(default_factory=list, description="The names of its steps, in order.")
    input: JsonValue = Field(default=None, description="What it was started with.")


class SagaStepCompleted(Payload, event_type=EventType.SAGA_STEP_COMPLETED):
    """One step of a saga is done, or undone."""

    saga_id: str
    name: str
    step: str
    step_number: int = Field(description="From 1, in the order of the definition.")
    attempt: int = Field(default=1, description="From 1.")
    duration_ms: float | None = Field(default=None, description="Of the last attempt.")
    result: JsonValue = None
    undone: bool = Field(default=False, description="Whether it was undone: its compensation is done.")


class SagaStepFailed(Payload, event_type=EventType.SAGA_STEP_FAILED):
    """One attempt of a saga's step failed."""

    saga_id: str
    name: str
    step: str
    step_number: int = Field(description="From 1, in the order of the definition.")
    attempt: int = Field(default=1, description="From 1.")
    will_retry: bool = Field(default=False, description="Whether another attempt follows.")
    error_type: str
    error: str = ""


class SagaCompleted(Payload, event_type=EventType.SAGA_COMPLETED):
    """A saga ended: all steps done, or all done steps undone, or stuck and waiting for an operator."""

    saga_id: str
    name: str
    outcome: Literal["completed", "compensated", "stuck"] = "completed"
    duration_ms: float | None = Field(default=None, description="Since it started.")


class SagaCompensating(Payload, event_type=EventType.SAGA_COMPENSATING):
    """A saga turned around and undoes its steps, the last one first."""

    saga_id: str
    name: str
    failed_step: str = Field(default="", description="Empty when an operator or the deadline asked for it.")
    reason: str = ""


class MemoryStored(Payload, event_type=EventType.MEMORY_STORED):
    """A memory was stored."""

    memory_id: str
    kind: str = Field(default="episodic", description="Such as episodic or semantic.")
    coordinate: list[float] = Field(
        default_factory=list, description="Its place in the memory space, where it has one."
    )
    importance: float = Field(default=0.0, description="As the storing service rates it.")
    size_bytes: int = 0


class MemoryRecalled(Payload, event_type=EventType.MEMORY_RECALLED):
    """Memories were recalled."""

    query: str
    memory_ids: list[str] = Field(default_factory=list, description="Best first.")
    scores: list[float] = Field(default_factory=list, description="One for each id, where the service has them.")
    duration_ms: float | None = None


class AgentTaskStarted(Payload, event_type=EventType.AGENT_TASK_STARTED):
    """An agent began a task."""

    task_id: str
    agent_id: str
    name: str = ""
    input: JsonValue = None


class AgentTaskCompleted(Payload, event_type=EventType.AGENT_TASK_COMPLETED):
    """An agent ended a task, well or not."""

    task_id: str
    agent_id: str
    outcome: Literal["succeeded", "failed", "cancelled"] = "succeeded"
    result: JsonValue = None
    error_type: str = Field(default="", description="Empty when it succeeded.")
    error: str = ""
    duration_ms: float | None = None


class Neuromodulators(Payload):
    """Levels as SomaBrain reports them."""

    dopamine: float = Field(description="0 to 0.8")
    serotonin: float = Field(description="0 to 1")
    noradrenaline: float = Field(description="0 to 0.1")
    acetylcholine: float = Field(description="0 to 0.5")


class CognitiveStateChanged(Payload, event_type=EventType.COGNITIVE_STATE_CHANGED):
    """The cognitive state of an agent changed."""

    agent_id: str
    sleep_state: Literal["active", "light", "deep", "freeze"] = "active"
    cognitive_load: float = Field(default=0.0, description="0 to 1; above 0.8 sleep follows.")
    neuromodulators: Neuromodulators | None = None
    cause: str = Field(default="", description="What changed it.")


STANDARD_MODELS: Final = PayloadModels(
    TxnStarted,
    TxnCommitted,
    TxnFailed,
    TxnCompensating,
    TxnRolledBack,
    SagaStarted,
    SagaStepCompleted,
    SagaStepFailed,
    SagaCompleted,
    SagaCompensating,
    MemoryStored,
    MemoryRecalled,
    AgentTaskStarted,
    AgentTaskCompleted,
    CognitiveStateChanged,
)
