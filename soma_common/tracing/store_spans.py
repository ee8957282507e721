"""What an event store shows of its work: its transactions, and appends whose context travels with the events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import appending, transaction
from soma_common.tracing.tracer import Begun, TransactionTracer


class StoreSpans:
    """Appends and transactions as spans; ``AppendSettings(spans=StoreSpans(tracer))``."""

    def __init__(self, tracer: TransactionTracer) -> None:
        self._tracer = tracer

    @property
    def active(self) -> bool:
        """Whether there is a provider."""
        return self._tracer.active

    @contextmanager
    def appending(
        self, events: Sequence[Any], topics: Sequence[str | None], fresh: TraceContext | None
    ) -> Iterator[None]:
        """Around the statements that record these drafts. Those of one trace share a span, and carry it on.

        ``fresh``: the trace that was made up for events without any; the span of those begins a trace.
        """
        families: dict[TraceContext, list[int]] = {}
        for place, event in enumerate(events):
            families.setdefault(event.trace, []).append(place)
        spans: list[Begun] = []
        for parent, places in families.items():
            what = appending([topics[place] for place in places], [events[place] for place in places])
            begun = self._tracer.begin(what, parent=None if parent is fresh else parent)
            spans.append(begun)
            context = begun.trace
            for place in places:
                events[place].trace = context
        try:
            yield
        except BaseException as error:
            _end(spans, error)
            raise
        _end(spans)

    def transaction(self) -> AbstractContextManager[TraceContext | None]:
        """Around a transaction that was given no name."""
        return self._tracer.doing(transaction())


def _end(spans: Sequence[Begun], error: BaseException | None = None) -> None:
    for span in spans:
        span.end(error)
