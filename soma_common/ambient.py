"""What the work at hand is done for: the tenant, the correlation, the trace and the baggage of this task or thread.

A request sets it (middleware/), and so does every event that is handled and every step of a saga. Tasks inherit it from
those that start them; a service does not (``Service.start``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from soma_common.tracing.context import TraceContext


class Ambient(NamedTuple):
    """What a block of work is done for; what is None is not known.

    Whatever has these attributes can stand in its place: a recorded event does, so that nothing is made per event.
    """

    tenant_id: str | None = None
    correlation_id: str | None = None
    trace: TraceContext | None = None
    baggage: str | None = None


AMBIENT: Final[ContextVar[Any]] = ContextVar("soma_ambient", default=None)

# What log lines belong to, where that is more than what the work is done for: a traced call, a `log_context`.
LOGGED: Final[ContextVar[Any]] = ContextVar("soma_logged", default=None)


def told_in_logs() -> Any:
    """What log lines belong to now: something with the attributes of :class:`Ambient`, or None."""
    logged = LOGGED.get()
    return AMBIENT.get() if logged is None else logged


def current_tenant() -> str | None:
    """The tenant for whom this task or thread works now: of the request, the handled event or the saga; else None."""
    known = AMBIENT.get()
    return None if known is None else known.tenant_id


def current_correlation_id() -> str | None:
    """The business transaction to which the work of this task or thread belongs now; None outside of any."""
    known = AMBIENT.get()
    return None if known is None else known.correlation_id


def current_baggage() -> str | None:
    """The W3C baggage that came with the request or the handled event, as far as it was let in; None without any."""
    return getattr(AMBIENT.get(), "baggage", None)


def carried_trace() -> TraceContext | None:
    """The trace that came with the request or the handled event, where no span of an SDK stands for it."""
    known = AMBIENT.get()
    return None if known is None else known.trace


@contextmanager
def working_for(known: Any) -> Iterator[None]:
    """Around a block: it is done for this. An :class:`Ambient`, or something with its attributes."""
    token = AMBIENT.set(known)
    try:
        yield
    finally:
        AMBIENT.reset(token)


def in_trace(trace: TraceContext) -> Ambient:
    """What is known now, in another trace."""
    return Ambient(current_tenant(), current_correlation_id(), trace, current_baggage())
