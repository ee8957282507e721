"""What is needed to begin a saga, checked."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from soma_common.ambient import current_correlation_id
from soma_common.errors import ValidationError
from soma_common.events.ids import uuid7
from soma_common.events.keys import check_name
from soma_common.sagas.models import Saga
from soma_common.sagas.store import NORMAL, Start
from soma_common.sagas.values import encode
from soma_common.tracing.context import TraceContext


def begin(
    saga: Saga, given: Any, *, tenant_id: str, saga_key: str | None = None, correlation_id: str | None = None,
    priority: int = NORMAL, trace: TraceContext | None = None, saga_id: UUID | None = None,
) -> Start:  # fmt: skip
    """A saga that is to begin.

    Raises:
        ValidationError: a name or a number that cannot be; the input is not of its type, or cannot be kept.
    """
    if not isinstance(saga, Saga):
        raise ValidationError(f"{saga!r:.100} is no Saga.", cure="pass a definition: Saga(name, Input, step, ...).")
    check_name("tenant_id", tenant_id)
    if saga_key is not None:
        check_name("saga_key", saga_key)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 1 <= priority <= 5:
        raise ValidationError(f"priority is {priority!r:.80}.", cure="use 1 (most urgent) to 5.")
    known = saga_id or uuid7()
    correlation = correlation_id or current_correlation_id() or str(known)
    return Start(
        saga=saga, input=encode(saga.input, given, f"The input of {saga.name}"), tenant_id=tenant_id,
        saga_key=saga_key, correlation_id=check_name("correlation_id", correlation),
        priority=priority, trace=trace or TraceContext.new(), saga_id=known,
    )  # fmt: skip
