"""What a stream can show, and a handler that writes a line to it whatever it is."""

from __future__ import annotations

import codecs
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from soma_common.errors import ConfigurationError

_EMOJI = "✅🗄️⏱️"


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """How lines look on a stream: whether with emoji, with colours, and in which encoding they must be written."""

    emoji: bool
    colour: bool
    encoding: str


def looks_of(
    stream: Any, *, emoji: bool | None = None, colour: bool | None = None, env: Mapping[str, str] | None = None
) -> Looks:
    """The looks of a stream; what is given wins.

    Emoji where the stream's encoding has them. Colours on a terminal that is not ``TERM=dumb``; ``NO_COLOR`` and
    ``FORCE_COLOR`` (not empty) say otherwise, the former wins.
    """
    env = os.environ if env is None else env
    encoding = _encoding(stream)
    if colour is None:
        wanted = bool(env.get("FORCE_COLOR")) or (is_terminal(stream) and env.get("TERM") != "dumb")
        colour = wanted and not env.get("NO_COLOR")
    if emoji is None:
        emoji = _can_show(encoding, _EMOJI)
    return Looks(emoji=emoji, colour=colour, encoding=encoding)


def is_terminal(stream: Any) -> bool:
    """Whether somebody sits before it. A stream that cannot say (closed, none, made up) is no terminal."""
    try:
        return bool(stream.isatty())
    except Exception:
        return False


def encodable(text: str, encoding: str) -> str:
    """The text with what an encoding has no character for as escapes."""
    if encoding == "utf-8":
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")


def _encoding(stream: Any) -> str:
    """The stream's encoding by its standard name; streams that have none (``StringIO``) take any character."""
    name = getattr(stream, "encoding", None)
    if not isinstance(name, str):
        return "utf-8" if name is None and stream is not None else "ascii"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "ascii"


def _can_show(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeError:
        return False
    return True


class SomaStackHandler(logging.StreamHandler[TextIO]):
    """Writes each record as a line, and never raises.

    A character that the stream's encoding does not have is written as its escape. A stream that is closed, or whose
    reader has gone, loses the line; ``lost`` counts those, since there is nobody to tell.

    Args:
        stream: a text stream, or ``"stderr"`` or ``"stdout"``: what ``sys`` has by that name when a line is written.
    """

    def __init__(self, stream: TextIO | Literal["stderr", "stdout"] = "stderr") -> None:
        if isinstance(stream, str) and stream not in ("stderr", "stdout"):
            raise ConfigurationError(f"{stream!r:.80} is no stream.", cure="give 'stderr', 'stdout' or a text stream.")
        self._named = stream if isinstance(stream, str) else None
        super().__init__(sys.stderr if isinstance(stream, str) else stream)
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line."""
        try:
            line = self.format(record)
        except Exception:  # another formatter than ours
            self.handleError(record)
            return
        try:
            self._write(f"{line}{self.terminator}")
        except Exception:
            self.lost += 1

    def flush(self) -> None:
        """Flush the stream, if there still is one."""
        try:
            super().flush()
        except Exception:  # what the buffer held is lost: it was closed, or its reader has gone
            self.lost += 1

    def _write(self, text: str) -> None:
        stream = getattr(sys, self._named) if self._named else self.stream
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(encodable(text, _encoding(stream)))
        stream.flush()
