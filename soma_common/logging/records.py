"""What a log record says, whoever made it: its message, its own fields, its ids, its error. Nothing here raises."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from soma_common.ambient import told_in_logs
from soma_common.logging.text import cut, cut_middle
from soma_common.logging.values import MAX_TEXT, text_of
from soma_common.tracing.spans import span_ids

_IDS: Final = ("trace_id", "span_id", "correlation_id", "tenant_id")
_LONGEST_ID: Final = 200

# What every record has, and what OpenTelemetry's instrumentation of logging puts on it: the span says the same.
STANDARD: Final = frozenset(
    (
        *vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "otelTraceID", "otelSpanID",
        "otelTraceSampled", "otelServiceName",
    )
)  # fmt: skip


class Ids(NamedTuple):
    """What a line belongs to; each None where it is not known."""

    trace_id: str | None
    span_id: str | None
    correlation_id: str | None
    tenant_id: str | None


class Failure(NamedTuple):
    """An exception of a record: the name of its class, its text, its traceback with all that caused it."""

    type: str
    message: str
    stacktrace: str


def message_of(record: logging.LogRecord) -> str:
    """The message; with arguments that do not fit it, or cannot be written, what can be told of both."""
    message = record.msg
    if type(message) is not str:
        message = text_of(message)
    if record.args:
        try:
            message %= record.args
        except Exception:
            return f"{text_of(message)} {text_of(_arguments(record.args))}"
    return message if len(message) <= MAX_TEXT else text_of(message)


def _arguments(args: Any) -> str:
    given = args if isinstance(args, tuple) else (args,)
    return f"({', '.join(map(text_of, given))})"


def extras_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller added by ``extra=``; the entries of a mapping called ``data`` stand beside the others."""
    extras = {name: value for name, value in record.__dict__.items() if name not in STANDARD}
    data = extras.get("data")
    if data is None or not isinstance(data, Mapping):
        return extras
    del extras["data"]
    try:
        return {**extras, **data}
    except Exception:  # a mapping that does not let itself be read, or whose keys are no text
        return {**extras, "data": data}


def take_ids(extras: dict[str, Any]) -> Ids:
    """The ids of a record, taken out of its extras; else those of the current span, else those of the context."""
    given = [extras.pop(name, None) for name in _IDS] if not extras.keys().isdisjoint(_IDS) else None
    context = told_in_logs()
    trace_id = span_id = correlation_id = tenant_id = None
    if given is not None:
        trace_id, span_id = _id(given[0], 32), _id(given[1], 16)
        correlation_id, tenant_id = _id(given[2]), _id(given[3])
    if trace_id is None:
        span = span_ids()
        if span is not None:
            trace_id, span_id = span[0], span_id or span[1]
    if context is not None:
        trace = getattr(context, "trace", None)
        if trace_id is None and trace is not None:
            trace_id, span_id = trace.trace_id, span_id or trace.span_id
        correlation_id = correlation_id or _id(getattr(context, "correlation_id", None))
        tenant_id = tenant_id or _id(getattr(context, "tenant_id", None))
    return Ids(trace_id, span_id, correlation_id, tenant_id)


def _id(value: Any, digits: int = 0) -> str | None:
    """An id as text; a number where OpenTelemetry has one (``digits``) is written as it writes it."""
    if value is None or value == "":
        return None
    if digits and type(value) is int and value >= 0:
        return f"{value:0{digits}x}"[:_LONGEST_ID]
    return cut(text_of(value), _LONGEST_ID)


def failure_of(record: logging.LogRecord) -> Failure | None:
    """The exception of a record. One that came from another process has its text only: where in it class and message
    are, cannot be told for sure."""
    info: Any = record.exc_info
    if isinstance(info, BaseException):
        error: Any = info
    else:
        error = info[1] if isinstance(info, tuple) and len(info) == 3 else None
    if isinstance(error, BaseException):
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return Failure(text_of(name), text_of(error), _traceback(error))
    if record.exc_text:
        return Failure("", "", text_of(record.exc_text))
    return None


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.TracebackException(type(error), error, error.__traceback__, compact=True).format()
        return text_of(cut_middle("".join(lines).rstrip("\n"), MAX_TEXT - 100))
    except Exception:
        return f"{text_of(type(error).__qualname__)}: {text_of(error)}"


def unwritable(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """What can be told of a record that made a formatter fail, as a record that does not."""
    own = vars(record)
    return logging.makeLogRecord(
        {
            "name": text_of(own.get("name", "root")),
            "levelno": logging.ERROR,
            "levelname": text_of(own.get("levelname", "ERROR")),
            "msg": f"A log record cannot be written: {type(error).__name__}",
        }
    )


class Moments:
    """When records were made, as text. The second is written once for all records in it."""

    def __init__(self, *, utc: bool = True) -> None:
        self._utc = utc
        self._second: tuple[int | None, str] = (None, "")

    def iso(self, created: float) -> str:
        """``2026-11-03T09:30:00.123456+00:00``: in UTC."""
        second, fraction = self._parts(created)
        return f"{second}.{fraction:06d}+00:00"

    def of_day(self, created: float) -> str:
        """``09:30:00.123``."""
        second, fraction = self._parts(created)
        return f"{second[11:]}.{fraction // 1000:03d}"

    def _parts(self, created: float) -> tuple[str, int]:
        try:
            whole = int(created // 1)
            known = self._second  # one tuple, so that threads see both or neither
            if known[0] != whole:
                known = self._second = (whole, self._written(whole))
            return known[1], min(int((created - whole) * 1_000_000), 999_999)
        except Exception:  # a record whose time is none
            return self._parts(time.time())

    def _written(self, second: int) -> str:
        moment = datetime.fromtimestamp(second, UTC)
        return (moment if self._utc else moment.astimezone()).isoformat()[:19]
