"""Spans around the library's work: the one edge to OpenTelemetry. Never sets a provider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState

from soma_common.tracing.context import TraceContext

Kind = Literal["internal", "producer", "consumer"]
_KINDS = {"internal": SpanKind.INTERNAL, "producer": SpanKind.PRODUCER, "consumer": SpanKind.CONSUMER}


class TransactionTracer:
    """Opens spans under the trace that an event carries, and tells which trace is current.

    Uses whatever TracerProvider the application has set. With none, spans record nothing, and the trace ids still
    travel from event to event.
    """

    def __init__(self, name: str = "soma-common") -> None:
        self._tracer = trace.get_tracer(name)

    def current(self) -> TraceContext | None:
        """The trace of the current span, None outside of one."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        state = context.trace_state.to_header() or None
        return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags), state)

    @contextmanager
    def span(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Iterator[TraceContext | None]:
        """A span around a block, under ``parent`` or else the current span; an exception is recorded on it."""
        context = None if parent is None else trace.set_span_in_context(NonRecordingSpan(_remote(parent)))
        with self._tracer.start_as_current_span(name, context, _KINDS[kind], attributes):
            yield self.current()


def _remote(parent: TraceContext) -> SpanContext:
    return SpanContext(
        trace_id=int(parent.trace_id, 16),
        span_id=int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState.from_header([parent.tracestate] if parent.tracestate else []),
    )
