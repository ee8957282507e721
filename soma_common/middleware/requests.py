"""A request as work for somebody: from its headers to its end. What the middlewares of all interfaces share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from soma_common.ambient import working_for
from soma_common.middleware.headers import ContextSettings, Values, said
from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import ROUTE, STATUS, requesting
from soma_common.tracing.tracer import Begun, TransactionTracer

_SERVER_ERROR: Final = 500


class Request:
    """One request: what it is done for, and its span where it has one of ours."""

    def __init__(self, settings: ContextSettings, values: Values, method: str, path: str, scheme: str) -> None:
        self._said, self._method = said(settings, path, values), method
        self._span: Begun | None = None
        self._status = 0
        self.header = settings.correlation_header
        tracer = _TRACER
        trace = self._said.trace
        if tracer.active and tracer.current() is None:
            if settings.spans:
                self._span = tracer.begin(requesting(method, path, scheme), parent=trace, root=True)
        elif not tracer.active and tracer.current() is None:
            trace = trace or TraceContext.new()
        self._ambient = self._said.ambient(trace)

    @property
    def correlation_id(self) -> str:
        """What the answer's header says."""
        return self._said.correlation_id

    @property
    def refusal(self) -> str:
        """Why it is not served; empty if it is."""
        return self._said.refusal

    @contextmanager
    def current(self) -> Iterator[None]:
        """Around a part of its work; nothing of it is left behind in the task or the thread."""
        with working_for(self._ambient):
            if self._span is None:
                yield
                return
            with self._span.current():
                yield

    def answered(self, status: int) -> None:
        """The answer has begun."""
        self._status = status

    def end(self, error: BaseException | None = None, *, route: str | None = None) -> None:
        """It is over. Safe to call twice."""
        span, self._span = self._span, None
        if span is None:
            return
        known: dict[str, Any] = {STATUS: self._status} if self._status else {}
        if route:
            known[ROUTE] = route
        span.say(f"{self._method} {route}" if route else None, known)
        if error is None and self._status >= _SERVER_ERROR:
            span.failed(str(self._status))
        span.end(error)


_TRACER: Final = TransactionTracer()
