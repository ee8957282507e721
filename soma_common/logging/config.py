"""Logging set up in one call, for programs that have no ``dictConfig`` of their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from soma_common.errors import ConfigurationError
from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.levels import SUCCESS as SUCCESS
from soma_common.logging.queueing import QueueingHandler, WhenFull
from soma_common.logging.streams import SomaStackHandler, is_terminal

Format = Literal["auto", "console", "json"]

_MARK: Final = "_soma_configured"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQueue:
    """How lines wait for the thread that writes them; see :class:`soma_common.logging.queueing.QueueingHandler`."""

    capacity: int = 10_000
    when_full: WhenFull = "drop"
    drain: float = 5.0


def configure_logging(
    *,
    service: str | None = None,
    level: int | str = "INFO",
    format: Format = "auto",  # noqa: A002 - as logging.basicConfig has it
    emoji: bool | None = None,
    colour: bool | None = None,
    stream: Any = "stderr",
    queue: LogQueue | bool = False,
    secrets: Iterable[str] = (),
    force: bool = False,
) -> logging.Handler:
    """Let the root logger write this library's lines to a stream; the handler that does.

    A second call takes the place of the first. Handlers that others gave to the root logger stay, except by ``force``.

    Args:
        service: the name of this service on each line; default ``SOMA_SERVICE_ID``.
        level: of the root logger: a number or a name, ``"SUCCESS"`` too.
        format: ``"console"``: lines for people, ``"json"``: JSON lines, ``"auto"``: the former on a terminal.
        emoji: whether console lines have emoji; default: where the stream can show them.
        colour: whether console lines have colours; default: on a terminal, see ``NO_COLOR`` and ``FORCE_COLOR``.
        stream: ``"stderr"``, ``"stdout"`` or a text stream.
        queue: True or a ``LogQueue``: lines are written by a thread, so that an event loop never waits for them; what
            is queued is written at exit.
        secrets: more names of fields whose values are hidden.
        force: take all other handlers from the root logger, and close them.

    Raises:
        ConfigurationError: an unknown level, format or stream; a wrong name of the service; wrong bounds of the queue.
    """
    number = _number(level)
    target = SomaStackHandler(stream)
    target.setFormatter(_formatter(format, target.stream, service, emoji, colour, tuple(secrets)))
    handler: logging.Handler = target
    if queue:
        bounds = LogQueue() if queue is True else queue
        handler = QueueingHandler(target, capacity=bounds.capacity, when_full=bounds.when_full, drain=bounds.drain)
    setattr(handler, _MARK, True)
    root = logging.getLogger()
    for other in list(root.handlers):
        if force or hasattr(other, _MARK):
            root.removeHandler(other)
            other.close()
    root.addHandler(handler)
    root.setLevel(number)
    return handler


def queued_handler(
    stream: Any = "stderr", *, capacity: int = 10_000, when_full: WhenFull = "drop", drain: float = 5.0
) -> QueueingHandler:
    """A stream's handler with a queue before it, for ``dictConfig``:
    ``{"()": "soma_common.logging.config.queued_handler", "stream": "stdout", "formatter": …}``.

    Raises:
        ConfigurationError: an unknown stream; wrong bounds of the queue.
    """
    return QueueingHandler(SomaStackHandler(stream), capacity=capacity, when_full=when_full, drain=drain)


def _number(level: int | str) -> int:
    if isinstance(level, str):
        known = logging.getLevelNamesMapping().get(level.upper())
        if known is None:
            raise ConfigurationError(
                f"{level!r:.40} is no level.", cure="use DEBUG, INFO, SUCCESS, WARNING, ERROR, CRITICAL or a number."
            )
        return known
    return level


def _formatter(
    kind: str, stream: Any, service: str | None, emoji: bool | None, colour: bool | None, secrets: tuple[str, ...]
) -> logging.Formatter:
    if kind not in ("auto", "console", "json"):
        raise ConfigurationError(f"format is {kind!r:.40}.", cure="use 'auto', 'console' or 'json'.")
    if kind == "json" or (kind == "auto" and not is_terminal(stream if stream is not None else sys.stderr)):
        return SomaStackJSONFormatter(service=service, secrets=secrets)
    return SomaStackFormatter(service=service, emoji=emoji, colour=colour, stream=stream, secrets=secrets)
