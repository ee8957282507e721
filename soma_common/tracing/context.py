"""W3C trace context as a value: parsed, printed, and made anew without an SDK."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_TRACEPARENT = re.compile(r"^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$")
_CURRENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")  # nearly every header there is
_ZERO_TRACE, _ZERO_SPAN = "0" * 32, "0" * 16
_made = tuple.__new__  # a named tuple's own constructor takes three times as long


class TraceContext(NamedTuple):
    """A W3C trace context (https://www.w3.org/TR/trace-context/).

    ``trace_id`` is 32 and ``span_id`` 16 lower-case hexadecimal digits; ``flags`` is 0..255, bit 0 = sampled.
    A named tuple, since there is one per event that is read.
    """

    trace_id: str
    span_id: str
    flags: int = 1
    tracestate: str | None = None

    @classmethod
    def new(cls) -> TraceContext:
        """A fresh root context with random ids."""
        digits = os.urandom(24).hex()
        return cls(trace_id=digits[:32], span_id=digits[32:])

    @classmethod
    def parse(cls, traceparent: str | None, tracestate: str | None = None) -> TraceContext | None:
        """The context in a ``traceparent`` header, or None where it is missing or malformed (the standard's rule)."""
        found = _CURRENT.fullmatch(traceparent or "")
        if found is not None:
            trace_id, span_id, flags = found.groups()
        else:
            found = _TRACEPARENT.match((traceparent or "").strip())
            if found is None:
                return None
            version, trace_id, span_id, flags = found.groups()
            if version == "ff" or (version == "00" and found.end() != 55):
                return None
        if trace_id == _ZERO_TRACE or span_id == _ZERO_SPAN:
            return None
        return _made(cls, (trace_id, span_id, 1 if flags == "01" else int(flags, 16), tracestate or None))

    @classmethod
    def recorded(cls, traceparent: str, tracestate: str | None) -> TraceContext:
        """The context in a header that this class wrote: version 00, fixed places, nothing to check."""
        flags = traceparent[53:]
        number = 1 if flags == "01" else int(flags, 16)
        return _made(cls, (traceparent[3:35], traceparent[36:52], number, tracestate))

    def child(self) -> TraceContext:
        """The same trace with a new span id."""
        return TraceContext(self.trace_id, os.urandom(8).hex(), self.flags, self.tracestate)

    @property
    def traceparent(self) -> str:
        """The ``traceparent`` header, version 00."""
        flags = "01" if self.flags == 1 else f"{self.flags:02x}"  # a format takes longer than all the rest
        return f"00-{self.trace_id}-{self.span_id}-{flags}"
