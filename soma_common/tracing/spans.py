"""The ids of the current span, for log lines: nothing is made but two texts."""

from __future__ import annotations

from opentelemetry import trace

_span = trace.get_current_span
_NONE = trace.INVALID_SPAN


def span_ids() -> tuple[str, str] | None:
    """Trace id (32 hexadecimal digits) and span id (16) of OpenTelemetry's current span; None outside of one."""
    span = _span()
    if span is _NONE:  # nearly always, where there is none
        return None
    context = span.get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
