"""What the services of a choreography tell each other: events of their own, on one stream per saga."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.events.standard import SagaCompensating, SagaCompleted, SagaStepCompleted, SagaStepFailed

SAGA_STREAM: Final = "saga"
ANNOUNCEMENTS: Final = PayloadModels(SagaStepCompleted, SagaStepFailed, SagaCompensating, SagaCompleted)
ANNOUNCED: Final = frozenset(event_type for event_type, _ in ANNOUNCEMENTS)


def announced(saga_id: UUID, tenant_id: str, payload: Payload, *, correlation_id: str = "") -> Event:
    """An announcement. All of one saga are on one stream, so that those of a service keep their order."""
    return Event(
        payload=payload, tenant_id=tenant_id, aggregate_type=SAGA_STREAM, aggregate_id=str(saga_id),
        correlation_id=correlation_id,
    )  # fmt: skip


def compensating(
    name: str, saga_id: UUID, tenant_id: str, reason: str, *, failed_step: str = "", correlation_id: str = ""
) -> Event:
    """That all is to be undone."""
    payload = SagaCompensating(saga_id=str(saga_id), name=name, failed_step=failed_step, reason=reason)
    return announced(saga_id, tenant_id, payload, correlation_id=correlation_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An announcement as it came. Fields that it does not have are empty."""

    service: str
    step: str
    undone: bool
    outcome: str
    reason: str
    error_type: str
    error: str
    took: float | None

    @classmethod
    def of(cls, event: RecordedEvent, name: str, saga_id: UUID) -> Heard | None:
        """Read one; None when it is of another saga, or of a step that is not the announcing service's.

        Read without its model: a service with a newer version of this library may say more than that has.
        """
        said = event.payload if isinstance(event.payload, Mapping) else {}
        if said.get("name") != name or said.get("saga_id") != str(saga_id):
            return None
        if "step" in said and not str(said["step"]).startswith(f"{event.service_id}/"):
            return None
        took = said.get("duration_ms")
        return cls(
            service=event.service_id, step=str(said.get("step") or said.get("failed_step") or ""),
            undone=said.get("undone") is True, outcome=str(said.get("outcome", "completed")),
            reason=_text(said, "reason"), error_type=_text(said, "error_type"), error=_text(said, "error"),
            took=took / 1000 if isinstance(took, int | float) else None,
        )  # fmt: skip


def _text(said: Mapping[str, Any], name: str) -> str:
    return str(said.get(name) or "")
