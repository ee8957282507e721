"""An error as a dead letter keeps it: type, message, stack, and a fingerprint that tells kinds of failure apart."""

from __future__ import annotations

import hashlib
import re
import traceback
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from types import TracebackType
from typing import Final

MOST_STACK: Final = 8192  # bytes
MOST_MESSAGE: Final = 4096  # bytes
_MOST_NAME = 512  # bytes
_FRAMES = 5  # the innermost ones tell where; the outer ones differ by who called
_SHOWN_FRAMES = 40
_CUT = "[...]\n"

_VOLATILE = re.compile(
    r"0x[0-9a-fA-F]+|[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}|\b[0-9a-fA-F]{16,}\b|'[^']*'|\"[^\"]*\"|\d+"
)


class Stage(StrEnum):
    """Where an event failed: its bytes, its payload's rules, a handler, the way to Kafka, a saga's compensation."""

    DECODE = "decode"
    VALIDATE = "validate"
    HANDLE = "handle"
    PUBLISH = "publish"
    UNDO = "undo"


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with an event. Texts are bounded and hold nothing that PostgreSQL would refuse.

    ``fingerprint`` is equal for failures of one kind: the same stage, event type, error type and innermost functions,
    whatever ids and numbers the message names and on whatever lines the functions stand.
    """

    stage: Stage
    error_type: str
    message: str
    stack: str
    fingerprint: str

    @classmethod
    def of(cls, stage: Stage, error: BaseException, *, event_type: str | None = None) -> Failure:
        """Describe an error with its traceback."""
        kind = storable(_kind(error), _MOST_NAME)
        message = storable(_message(error), MOST_MESSAGE)
        return cls(stage, kind, message, _stack(error), fingerprint(stage, event_type, kind, error, message))


def fingerprint(stage: Stage, event_type: str | None, error_type: str, error: BaseException, message: str = "") -> str:
    """16 hexadecimal digits. An error that was never raised has no frames: then its message stands for them."""
    frames = _innermost(error.__traceback__) or [steady(message)]
    told = "\0".join([stage, event_type or "", error_type, *frames])
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()[:16]


def steady(message: str) -> str:
    """The first line of a message without what differs from one event to the next: ids, numbers, quoted values."""
    lines = message.strip().splitlines() or [""]
    return _VOLATILE.sub("*", lines[0][:1000])


def storable(text: str, most: int) -> str:
    """A text that PostgreSQL takes (no NUL, no lone surrogates), cut to so many bytes of UTF-8."""
    clean = text[: most + 1].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    return clean[:most].decode("utf-8", "ignore")


def _kind(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # a __str__ of somebody else must not hide the failure
        return f"(the message cannot be read: {type(broken).__name__})"


def _stack(error: BaseException) -> str:
    """The end of the traceback: the innermost frames and the error itself stand there."""
    try:
        lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-_SHOWN_FRAMES)
    except Exception as broken:  # as above
        lines = [f"(the traceback cannot be read: {type(broken).__name__})"]
    return tail("".join(line[:MOST_MESSAGE] for line in lines))


def tail(text: str) -> str:
    """The last 8 KiB of a text, marked where it was cut."""
    text = storable(text[-2 * MOST_STACK :], 8 * MOST_STACK)
    whole = text.encode()
    if len(whole) <= MOST_STACK:
        return text
    return _CUT + whole[len(_CUT) - MOST_STACK :].decode("utf-8", "ignore")


def _innermost(trace: TracebackType | None) -> list[str]:
    frames: list[str] = []
    while trace is not None:
        code = trace.tb_frame.f_code
        # The file's name without its folder: the same in another environment or checkout.
        frames.append(f"{PurePath(code.co_filename).name}:{code.co_name}")
        del frames[:-_FRAMES]
        trace = trace.tb_next
    return frames
