"""structlog beside the standard library: the last processor of its chain, which writes the same lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

_LEVELS: Final[Mapping[str, int]] = {"warn": logging.WARNING, "exception": logging.ERROR, "fatal": logging.CRITICAL}
_OURS: Final = frozenset(
    {"event", "level", "logger", "logger_name", "timestamp", "exc_info", "exception", "stack", "stack_info"}
)


class SomaStackProcessor:
    """Renders structlog's event as a formatter renders a record: ``structlog.configure(processors=[…, this])``.

    It is the last of the chain and takes the place of structlog's renderers, of ``TimeStamper``, ``add_log_level`` and
    ``format_exc_info``. ``logger`` in the event names the logger, all other keys are ``data``. structlog itself is not
    needed by this module.

    Args:
        formatter: a ``SomaStackJSONFormatter`` or ``SomaStackFormatter``, the one of your handlers for instance.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        self._formatter = formatter

    def __call__(self, logger: Any, method_name: str, event_dict: MutableMapping[str, Any]) -> str:
        """The line."""
        return self._formatter.format(record_of(logger, method_name, event_dict))


def record_of(logger: Any, method_name: str, event: Mapping[str, Any]) -> logging.LogRecord:
    """A log record that says what structlog's event says."""
    name = event.get("level", method_name)
    level = _level(name)
    record = logging.makeLogRecord(
        {
            "name": event.get("logger") or event.get("logger_name") or _name(logger),
            "msg": event.get("event", ""),
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "exc_info": _exc_info(event.get("exc_info")),
            "exc_text": event.get("exception"),
            "stack_info": event.get("stack") if isinstance(event.get("stack"), str) else None,
        }
    )
    # By way of "data", for an event may have keys that a record uses itself, such as "name" and "args".
    ids = {
        key: event[key]
        for key in ("trace_id", "span_id", "correlation_id", "tenant_id", "category", "event_type")
        if key in event
    }
    record.__dict__.update(ids)
    record.__dict__["data"] = {key: value for key, value in event.items() if key not in _OURS and key not in ids}
    return record


def _level(name: Any) -> int:
    """A level by structlog's name for it; structlog has no SUCCESS, but an event may say ``level="success"``."""
    if isinstance(name, int):
        return name
    known = _LEVELS.get(str(name).lower()) or logging.getLevelNamesMapping().get(str(name).upper())
    return logging.INFO if known is None else known


def _name(logger: Any) -> str:
    name = getattr(logger, "name", None)
    return name if isinstance(name, str) else "root"


def _exc_info(given: Any) -> Any:
    if isinstance(given, BaseException):
        return (type(given), given, given.__traceback__)
    if isinstance(given, tuple):
        return given
    return sys.exc_info() if given else None
