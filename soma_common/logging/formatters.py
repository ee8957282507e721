"""The two formatters: lines for people, and JSON for machines. Both give a line for any record, and never raise."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import orjson

from soma_common.config import service_name
from soma_common.errors import ConfigurationError
from soma_common.logging.markers import CATEGORIES, TRACE_LINK, Marker, category_of, marker_of
from soma_common.logging.records import Moments, extras_of, failure_of, message_of, take_ids, unwritable
from soma_common.logging.secrets import Secrets
from soma_common.logging.shortening import SHORTEST, ascii_json, shortened
from soma_common.logging.streams import encodable, looks_of
from soma_common.logging.text import TRUNCATED, cut, cut_middle, plain
from soma_common.logging.values import dumps, text_of

_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_COLOURS: Final = ((40, "\x1b[31m"), (30, "\x1b[33m"), (25, "\x1b[32m"), (20, "\x1b[36m"), (0, "\x1b[2m"))
_NO_MARKERS: Final[Mapping[str, Marker]] = MappingProxyType({})


class _Formatter(logging.Formatter):
    """What both have: they can be made by ``dictConfig`` in either of its ways, and have a shape of their own."""

    def __init__(self, fmt: str | None, datefmt: str | None, service: str | None, secrets: Iterable[str]) -> None:
        super().__init__()
        if fmt is not None or datefmt is not None:
            raise ConfigurationError(
                f"{type(self).__name__} has a shape of its own.", cure="leave out format and datefmt."
            )
        self._service = service or service_name(os.environ)
        self._secrets = Secrets(secrets)


class SomaStackJSONFormatter(_Formatter):
    """One JSON object per record, on one line, in ASCII (JSON's escapes for the rest, so any stream can carry it).

    Always there: ``timestamp`` (UTC, with offset, microseconds), ``level``, ``service``, ``logger``, ``message``,
    ``trace_id``, ``correlation_id``, ``tenant_id`` (each text or null) and ``data`` (an object: what ``extra`` gave).
    Where there is one: ``span_id``, ``category``, ``exception`` (``type``, ``message``, ``stacktrace``), ``stack``.

    Args:
        service: the name of this service; default ``SOMA_SERVICE_ID``.
        secrets: more names of fields whose values are hidden, beside passwords, tokens and the like.
        limit: most bytes of a line; at least 1,000. Docker and Kubernetes break lines in two at 16 KiB.
        categories: more families of event types that are categories of their own: ``["BILLING"]``.

    Raises:
        ConfigurationError: the limit is too small, or a format was given.
    """

    def __init__(
        self,
        fmt: str | None = None,
        datefmt: str | None = None,
        style: str = "%",
        validate: bool = True,
        *,
        service: str | None = None,
        secrets: Iterable[str] = (),
        limit: int = 16_000,
        categories: Iterable[str] = (),
    ) -> None:
        super().__init__(fmt, datefmt, service, secrets)
        if limit < SHORTEST:
            raise ConfigurationError(f"limit is {limit}.", cure=f"give at least {SHORTEST:,} bytes.")
        self._limit, self._moments = limit, Moments()
        self._categories = frozenset((*CATEGORIES, *map(str.upper, categories)))

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        try:
            return self._line(record)
        except Exception as error:
            return self._line(unwritable(record, error))

    def _line(self, record: logging.LogRecord) -> str:
        extras = extras_of(record)
        trace_id, span_id, correlation_id, tenant_id = take_ids(extras)
        line: dict[str, Any] = {
            "timestamp": self._moments.iso(record.created),
            "level": _text(record.levelname),
            "service": self._service,
            "logger": _text(record.name),
            "message": message_of(record),
            "trace_id": trace_id,
            "correlation_id": correlation_id,
            "tenant_id": tenant_id,
            "data": extras,
        }
        if span_id is not None:
            line["span_id"] = span_id
        if "category" in extras or "event_type" in extras:
            line["category"] = category_of(extras, self._categories)
            extras.pop("category", None)
        if record.exc_info or record.exc_text or record.stack_info:
            _add_failure(line, record)
        text = ascii_json(dumps(line))
        if self._secrets.suspected(text):
            text = ascii_json(dumps(self._secrets.without(orjson.loads(text))))
        return text if len(text) <= self._limit else shortened(orjson.loads(text), self._limit)


def _text(name: Any) -> str:
    return name if type(name) is str else text_of(name)


def _add_failure(line: dict[str, Any], record: logging.LogRecord) -> None:
    failure = failure_of(record)
    if failure is not None:
        line["exception"] = failure._asdict()
    if record.stack_info:
        line["stack"] = text_of(record.stack_info)


class SomaStackFormatter(_Formatter):
    """A line for people: ``emoji HH:MM:SS.mmm [service] 🔗trace LEVEL message``, in local time.

    ``trace`` is the trace id's first 8 characters, left out where there is none. Nested data, exceptions and stacks
    follow on lines of their own, which begin with four spaces: nothing that a record says can look like a record.

    Args:
        service: the name of this service; default ``SOMA_SERVICE_ID``.
        emoji: whether lines have emoji, or ASCII in their place; default: whether ``stream`` can show them.
        colour: whether lines have colours; default: as ``stream``, ``NO_COLOR`` and ``FORCE_COLOR`` say.
        stream: what it will be written to; default ``sys.stderr`` as it is now. Characters that this stream's
            encoding does not have are written as escapes.
        secrets: more names of fields whose values are hidden, beside passwords, tokens and the like.
        limit: most characters of a record's data; what follows is ``[truncated]``.
        text_limit: most characters of a message, a traceback, a stack.
        categories: more markers, or others, by category: ``{"BILLING": Marker("💶", "billing")}``.

    Raises:
        ConfigurationError: a limit is negative, or a format was given.
    """

    def __init__(
        self,
        fmt: str | None = None,
        datefmt: str | None = None,
        style: str = "%",
        validate: bool = True,
        *,
        service: str | None = None,
        emoji: bool | None = None,
        colour: bool | None = None,
        stream: Any = None,
        secrets: Iterable[str] = (),
        limit: int = 500,
        text_limit: int = 16_000,
        categories: Mapping[str, Marker] = _NO_MARKERS,
    ) -> None:
        super().__init__(fmt, datefmt, service, secrets)
        if limit < 0 or text_limit < 0:
            raise ConfigurationError("A limit is negative.", cure="give 0 or more characters.")
        self._looks = looks_of(sys.stderr if stream is None else stream, emoji=emoji, colour=colour)
        self._limit, self._text_limit = limit, text_limit
        self._categories = {**CATEGORIES, **{name.upper(): Marker(*marker) for name, marker in categories.items()}}
        self._moments = Moments(utc=False)

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, and what belongs to it."""
        try:
            text = self._text(record)
        except Exception as error:
            text = self._text(unwritable(record, error))
        return encodable(text, self._looks.encoding)

    def _text(self, record: logging.LogRecord) -> str:
        extras = extras_of(record)
        return "\n".join([self._head(record, extras), *self._rest(record, extras)])

    def _head(self, record: logging.LogRecord, extras: dict[str, Any]) -> str:
        ids = take_ids(extras)
        category = category_of(extras, self._categories)
        extras.pop("category", None)
        level = record.levelno if isinstance(record.levelno, int) else logging.INFO
        message = self._said(message_of(record), lines=False)
        return self._told(ids.trace_id or "", record, message, marker_of(level, category, self._categories))

    def _told(self, trace_id: str, record: logging.LogRecord, message: str, marker: Marker) -> str:
        dim, reset = (_DIM, _RESET) if self._looks.colour else ("", "")
        at = 0 if self._looks.emoji else 1
        link = TRACE_LINK.emoji if self._looks.emoji else f"{TRACE_LINK.ascii}="
        trace = f" {link}{plain(trace_id[:8])}" if trace_id else ""
        origin = f"{self._moments.of_day(record.created)} [{plain(self._service)}]{trace}"
        return f"{marker[at]} {dim}{origin}{reset} {self._level(record)} {message}"

    def _level(self, record: logging.LogRecord) -> str:
        name = plain(cut(text_of(record.levelname), 100))
        if not self._looks.colour:
            return name
        level = record.levelno if isinstance(record.levelno, int) else 0
        return f"{next((colour for floor, colour in _COLOURS if level >= floor), _DIM)}{name}{_RESET}"

    def _rest(self, record: logging.LogRecord, extras: dict[str, Any]) -> Iterator[str]:
        if extras:
            data = self._secrets.without(orjson.loads(dumps(extras)))
            yield from _indented(plain(cut("\n".join(_outlined(data, self._limit)), self._limit), lines=True))
        failure = failure_of(record)
        if failure is not None:
            yield from _indented(self._said(failure.stacktrace, lines=True))
        if record.stack_info:
            yield from _indented(self._said(text_of(record.stack_info), lines=True))

    def _said(self, text: str, *, lines: bool) -> str:
        """A text as it may be shown: secrets are hidden before it is cut, for half of one has other looks."""
        hidden = self._secrets.without_in(text)
        return plain((cut_middle if lines else cut)(hidden, self._text_limit), lines=lines)


def _indented(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield f"    {line}"


def _outlined(data: Mapping[str, Any], limit: int) -> Iterator[str]:
    """Lines with what is nested indented, until there is more than the limit."""
    length = 0
    for line in _lines(data, ""):
        yield line
        length += len(line) + 1
        if length > limit + len(TRUNCATED):
            return


def _lines(value: Any, indent: str) -> Iterator[str]:
    entries = value.items() if isinstance(value, dict) else (("-", inner) for inner in value)
    for name, inner in entries:
        label = name if name == "-" and isinstance(value, list) else f"{plain(name)}:"
        if isinstance(inner, (dict, list)) and inner:
            yield f"{indent}{label}"
            yield from _lines(inner, f"{indent}  ")
        else:
            yield f"{indent}{label} {_scalar(inner)}"


def _scalar(value: Any) -> str:
    return plain(value) if isinstance(value, str) else orjson.dumps(value).decode()
