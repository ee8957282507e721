"""W3C trace context."""

from __future__ import annotations

import pytest

from soma_common.tracing.context import TraceContext

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_it_is_parsed_and_printed() -> None:
    context = TraceContext.parse(GOOD, "vendor=1")
    assert context is not None
    assert (context.trace_id, context.span_id, context.flags) == (GOOD[3:35], GOOD[36:52], 1)
    assert context.tracestate == "vendor=1"
    assert context.traceparent == GOOD
    assert TraceContext.parse(f"  {GOOD} ", "") == TraceContext(GOOD[3:35], GOOD[36:52], 1, None)


def test_a_later_version_may_say_more() -> None:
    later = TraceContext.parse("cc" + GOOD[2:] + "-what-is-new")
    assert later is not None
    assert later.traceparent == GOOD


@pytest.mark.parametrize(
    "header",
    [None, "", "nonsense", GOOD.upper(), GOOD + "-more", "ff" + GOOD[2:], GOOD[:-1], "00-" + "0" * 32 + GOOD[35:],
     GOOD[:36] + "0" * 16 + "-01", GOOD.replace("-", "_")],
)  # fmt: skip
def test_what_is_malformed_is_as_if_missing(header: str | None) -> None:
    assert TraceContext.parse(header) is None


def test_new_contexts_and_children() -> None:
    context = TraceContext.new()
    assert TraceContext.parse(context.traceparent) == context
    child = context.child()
    assert child.trace_id == context.trace_id
    assert child.span_id != context.span_id
    assert len({TraceContext.new().trace_id for _ in range(1000)}) == 1000
