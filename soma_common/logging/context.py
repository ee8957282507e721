"""What the log lines of a block belong to, where no span and no ``extra`` says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from soma_common.tracing.context import TraceContext


@dataclass(frozen=True, slots=True, kw_only=True)
class LogContext:
    """Ids for log lines; each None where it is not known."""

    trace: TraceContext | None = None
    correlation_id: str | None = None
    tenant_id: str | None = None


# A LogContext, or whatever else has these three: the event that is handled, the traced call that runs. Binding it costs
# one assignment; what the ids are is asked by those lines only that are written.
CURRENT: Final[ContextVar[Any]] = ContextVar("soma_log_context", default=None)


@contextmanager
def log_context(
    *, trace: TraceContext | None = None, correlation_id: str | None = None, tenant_id: str | None = None
) -> Iterator[LogContext]:
    """Log lines of this block, and of tasks it starts, have these ids; those not given are the enclosing block's.

    Handlers of events and traced functions have them already.
    """
    outer = CURRENT.get()
    context = LogContext(
        trace=trace or getattr(outer, "trace", None),
        correlation_id=correlation_id or getattr(outer, "correlation_id", None),
        tenant_id=tenant_id or getattr(outer, "tenant_id", None),
    )
    CURRENT.set(context)
    try:
        yield context
    finally:
        CURRENT.set(outer)
