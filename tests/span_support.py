"""A real SDK as the application's TracerProvider for one test, and what it recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Spans:
    """The spans that ended so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return sorted(span.name for span in self.all())

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of a name, the first begun first."""
        return sorted((span for span in self.all() if span.name == name), key=lambda span: span.start_time or 0)

    def one(self, name: str) -> ReadableSpan:
        found = self.named(name)
        assert len(found) == 1, (name, self.names())
        return found[0]


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    """Whether the one is a child of the other."""
    return child.parent is not None and child.context is not None and parent.context is not None and (
        (child.context.trace_id, child.parent.span_id) == (parent.context.trace_id, parent.context.span_id)
    )  # fmt: skip


def linked(span: ReadableSpan) -> set[int]:
    """The ids of the spans to which it is linked."""
    return {link.context.span_id for link in span.links}


@contextmanager
def provider_of_the_application(**given: Any) -> Iterator[Spans]:
    """A TracerProvider, set as an application sets it; given back at the end, which the API itself does not know."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False, **given)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", provider)
        yield Spans(exporter)
    provider.shutdown()
