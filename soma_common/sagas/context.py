"""What a step of a saga is told about itself."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from soma_common.tracing.context import TraceContext


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaContext:
    """Where in a saga a function is called; valid for one attempt.

    ``step`` is its path in the journal: its name, with the loops and sub-sagas around it (``pack[2]/label``).
    ``attempt`` counts from 1. ``undoing``: it is called as a compensation. ``version``: 0 in a choreography.
    """

    saga_id: UUID
    saga: str
    version: int
    step: str
    attempt: int
    tenant_id: str
    correlation_id: str
    undoing: bool = False
    trace: TraceContext | None = None

    @property
    def key(self) -> str:
        """The idempotency key for what happens outside of the database: the same on every attempt of this step, and
        another one for its compensation."""
        return f"{self.saga_id}:{self.step}" + (":undo" if self.undoing else "")
