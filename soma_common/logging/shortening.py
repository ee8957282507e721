"""Lines that are too long are made to fit, and stay valid JSON: text is cut, and what follows the cut is left out."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any, Final

from soma_common.logging.text import TRUNCATED, cut, cut_middle
from soma_common.logging.values import dumps

SHORTEST: Final = 1_000
"""Least limit of a line, in bytes: room for all fields that every line has."""

_SHORT_NAME: Final = 6
_LONG_NAME: Final = 200
_ESCAPES: Final = "soma_common.json_escapes"


def ascii_json(text: str) -> str:
    """JSON that says the same in printable ASCII: every stream can carry it, and nothing in it steers a terminal."""
    if "\x7f" in text:  # orjson has escaped all other characters of ASCII that cannot be printed
        text = text.replace("\x7f", "\\u007f")
    return text if text.isascii() else text.encode("ascii", _ESCAPES).decode("ascii")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """A run of characters outside ASCII as JSON's escapes."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be")
    return "\\u" + units.hex("-", 2).replace("-", "\\u"), error.end


codecs.register_error(_ESCAPES, _escaped)


def shortened(line: Mapping[str, Any], limit: int) -> str:
    """The line in at most ``limit`` bytes; each of message, error and data is cut to a part of that."""
    budget = limit
    while budget > _SHORT_NAME:
        budget //= 2  # escapes make text longer, by how much is known afterwards
        text = ascii_json(dumps(_within(line, budget)))
        if len(text) <= limit:
            return text
    return ascii_json(dumps(_least(line)))


def _within(line: Mapping[str, Any], budget: int) -> dict[str, Any]:
    fitted = {name: cut(text, _LONG_NAME) if isinstance(text, str) else text for name, text in line.items()}
    fitted["message"] = cut(str(line["message"]), budget)
    for name in ("exception", "stack"):
        if name in line:
            fitted[name] = _cut_all(line[name], budget // 2)
    fitted["data"] = fit(line["data"], budget)
    return fitted


def _cut_all(value: Any, budget: int) -> Any:
    if isinstance(value, dict):
        return {
            name: cut_middle(str(text), budget if name == "stacktrace" else budget // 2) for name, text in value.items()
        }
    return cut_middle(str(value), budget)


def _least(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every line has, without what makes it long."""
    least = {}
    for name, value in line.items():
        if name in ("timestamp", "level", "service", "logger", "trace_id", "span_id", "correlation_id", "tenant_id"):
            short = value is None or (str(value).isascii() and len(str(value)) <= 36)
            least[name] = value if short else cut(str(value), _SHORT_NAME)
    return {**least, "message": TRUNCATED, "data": {}}


def fit(value: Any, budget: int) -> Any:
    """A value made of JSON's kinds in about ``budget`` characters, from its beginning on."""
    return _fit(value, [budget])


def _fit(value: Any, left: list[int]) -> Any:
    if isinstance(value, str):
        text = cut(value, max(left[0], 0))
        left[0] -= len(text) + 3
        return text
    if isinstance(value, dict):
        kept: dict[str, Any] = {}
        for name, inner in value.items():
            if left[0] <= 0:
                kept[TRUNCATED] = len(value) - len(kept)
                break
            left[0] -= min(len(name), left[0]) + 4
            kept[cut(name, max(left[0], _SHORT_NAME))] = _fit(inner, left)
        return kept
    if isinstance(value, list):
        items: list[Any] = []
        for inner in value:
            if left[0] <= 0:
                items.append(TRUNCATED)
                break
            items.append(_fit(inner, left))
        return items
    left[0] -= len(str(value)) + 1
    return value
