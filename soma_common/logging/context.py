"""What the log lines of a block belong to, where no span and no ``extra`` says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from soma_common.ambient import LOGGED, Ambient, told_in_logs
from soma_common.tracing.context import TraceContext


@contextmanager
def log_context(
    *, trace: TraceContext | None = None, correlation_id: str | None = None, tenant_id: str | None = None
) -> Iterator[Ambient]:
    """Log lines of this block, and of tasks it starts, have these ids; those not given are the enclosing block's.

    It is about log lines alone: what is published in the block does not take its ids. Requests, handlers of events,
    steps of sagas and traced functions have theirs already.
    """
    before, outer = LOGGED.get(), told_in_logs()
    context = Ambient(
        trace=trace or getattr(outer, "trace", None),
        correlation_id=correlation_id or getattr(outer, "correlation_id", None),
        tenant_id=tenant_id or getattr(outer, "tenant_id", None),
    )
    LOGGED.set(context)
    try:
        yield context
    finally:
        LOGGED.set(before)
