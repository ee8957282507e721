"""Spans around the library's work: the one edge to OpenTelemetry. Never sets a provider."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any, Final

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracerProvider,
    ProxyTracerProvider,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
)

from soma_common.ambient import AMBIENT, LOGGED, carried_trace, in_trace, working_for
from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import ERROR_TYPE, Doing, Kind

_KINDS: Final = {
    "internal": SpanKind.INTERNAL,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
}
SILENT: Final = (ProxyTracerProvider, NoOpTracerProvider)  # the API's own: with these nothing is ever recorded
_NONE: Final = NoOpTracerProvider()
_BY_ENVIRONMENT: Final = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ
_MOST_LINKS: Final = 128  # what an SDK keeps of a span by default


class Begun:
    """A span that was begun and is not the current one; ``end`` it."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def trace(self) -> TraceContext:
        """Its context."""
        return _of(self._span.get_span_context())

    def end(self, error: BaseException | None = None) -> None:
        """It is over, well or with an error."""
        if error is not None:
            _failed(self._span, error)
        self._span.end()

    def say(self, name: str | None = None, attributes: Mapping[str, Any] | None = None) -> None:
        """What is known only later."""
        if self._span.is_recording():
            if name is not None:
                self._span.update_name(name)
            self._span.set_attributes(dict(attributes or {}))

    def failed(self, kind: str) -> None:
        """It is an error of this kind, although nothing was raised."""
        self._span.set_attribute(ERROR_TYPE, kind)
        self._span.set_status(Status(StatusCode.ERROR))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Around a block of its work: it is the current span."""
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield


class TransactionTracer:
    """Opens spans under the trace that an event carries, and tells which trace is current.

    Uses whatever TracerProvider the application has set, whenever it does. With none nothing is recorded and next to
    nothing is done, and the trace ids still travel from event to event.

    Args:
        name: of the instrumentation.
        provider: instead of the application's.
    """

    def __init__(self, name: str = "soma-common", provider: trace.TracerProvider | None = None) -> None:
        self._name, self._given = name, provider
        self._provider: trace.TracerProvider | None = None
        self._tracer: Tracer | None = None

    @property
    def active(self) -> bool:
        """Whether there is a provider: without one whoever asks can spare itself the rest."""
        return self._ready() is not None

    def current(self) -> TraceContext | None:
        """The trace of the current span; without one that of the request, event or step at hand; else None."""
        context = trace.get_current_span().get_span_context()
        return _of(context) if context.is_valid else carried_trace()

    def recorded(self) -> TraceContext | None:
        """The trace of the current span where an SDK makes spans, else None."""
        if self._ready() is None:
            return None
        context = trace.get_current_span().get_span_context()
        return _of(context) if context.is_valid else None

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
        with self.doing(Doing(name, kind, attributes or {}), parent=parent) as context:
            yield context

    @contextmanager
    def doing(
        self, what: Doing, *, parent: TraceContext | None = None, links: Iterable[TraceContext] = (), root: bool = False
    ) -> Iterator[TraceContext | None]:
        """The same for a span of :mod:`soma_common.tracing.conventions`. ``root``: it begins a trace of its own."""
        if self._ready() is None:
            with _carrying(parent):
                yield self.current()
            return
        begun = self.begin(what, parent=parent, links=links, root=root)
        try:
            with begun.current():
                yield begun.trace
        except BaseException as error:
            begun.end(error)
            raise
        begun.end()

    def begin(
        self, what: Doing, *, parent: TraceContext | None = None, links: Iterable[TraceContext] = (),
        root: bool = False, since: int | None = None,
    ) -> Begun:  # fmt: skip
        """A span that is not made the current one. ``since``: nanoseconds of the epoch, for one that began before.

        Raises:
            RuntimeError: there is no provider: ask ``active`` before.
        """
        tracer = self._ready()
        if tracer is None:
            raise RuntimeError("There is no TracerProvider.")
        context = otel.Context() if root else None
        if parent is not None:
            context = trace.set_span_in_context(NonRecordingSpan(_remote(parent)), otel.Context())
        linked = [Link(_remote(each)) for each in links]
        span = tracer.start_span(what.name, context, _KINDS[what.kind], what.attributes, linked, since)
        if what.more is not None and span.is_recording():
            span.set_attributes(dict(what.more()))
        return Begun(span)

    def _ready(self) -> Tracer | None:
        provider = self._given or _provider()
        if provider is not self._provider:  # it may be set at any time, once
            silent = isinstance(provider, SILENT)
            self._tracer = None if silent else provider.get_tracer(self._name)
            self._provider = provider
        return self._tracer


def _provider() -> trace.TracerProvider:
    """The application's provider. Asked for every handled event, so without the look into the environment by which
    OpenTelemetry finds out each time that there is still none."""
    if getattr(trace, "_TRACER_PROVIDER", trace) is None and not _BY_ENVIRONMENT:
        return _NONE
    return trace.get_tracer_provider()


def kinship(contexts: Iterable[TraceContext]) -> dict[str, Any]:
    """How one span stands to the messages it is about, as arguments of ``doing`` and ``begin``.

    Of one context it is a child, so that a message can be followed; of several it cannot be, so it begins a trace of
    its own that is linked to theirs (to at most 128 of them).
    """
    distinct = list(dict.fromkeys(contexts))
    if len(distinct) == 1:
        return {"parent": distinct[0]}
    return {"root": True, "links": distinct[:_MOST_LINKS]}


def outside() -> Context:
    """A copy of the present context in which nothing is done for anybody: no trace, no tenant."""
    context = copy_context()
    context.run(_forget)
    return context


def _forget() -> None:
    AMBIENT.set(None)
    LOGGED.set(None)
    if trace.get_current_span().get_span_context().is_valid:
        otel.attach(trace.set_span_in_context(trace.INVALID_SPAN))


@contextmanager
def _carrying(parent: TraceContext | None) -> Iterator[None]:
    """Without a provider: the trace travels all the same."""
    if parent is None:
        yield
    elif trace.get_current_span().get_span_context().is_valid:  # somebody else carries one by OpenTelemetry's means
        with trace.use_span(NonRecordingSpan(_remote(parent))):
            yield
    else:
        with working_for(in_trace(parent)):
            yield


def _failed(span: Span, error: BaseException) -> None:
    if not span.is_recording():
        return
    kind = type(error).__qualname__
    span.set_attribute(ERROR_TYPE, kind)
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, f"{kind}: {error!s:.500}"))


def _of(context: SpanContext) -> TraceContext:
    state = context.trace_state.to_header() or None if context.trace_state else None
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags), state)


def _remote(parent: TraceContext) -> SpanContext:
    return SpanContext(
        trace_id=int(parent.trace_id, 16),
        span_id=int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState.from_header([parent.tracestate] if parent.tracestate else []),
    )
