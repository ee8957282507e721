"""Any value as JSON: what orjson refuses or would show too much of is made simple first. Nothing here raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Any, Final

import orjson

from soma_common.logging.secrets import HIDDEN
from soma_common.logging.text import TRUNCATED, cut

MAX_TEXT: Final = 100_000  # characters of one text: what a log is not for
MAX_ITEMS: Final = 1_000
MAX_DEPTH: Final = 20

# Dataclasses pass through: orjson would show fields that are kept out of the repr.
_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATACLASS
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1


def dumps(value: Any) -> str:
    """The value as JSON on one line; in what form, is told in docs/reference/logging.md."""
    try:
        return orjson.dumps(value, simple, _OPTIONS).decode()
    except Exception:
        return orjson.dumps(_walked(value, (), MAX_DEPTH)).decode()


def text_of(value: Any) -> str:
    """``str(value)``, also where that raises or is no text that can be encoded."""
    try:
        text = value if type(value) is str else str.__str__(str(value))
        if len(text) > MAX_TEXT:
            text = cut(text, MAX_TEXT)
        if text.isascii():
            return text
        return text.encode("utf-8", "backslashreplace").decode()
    except Exception:
        return f"<unprintable {_kind(value)}>"


def simple(value: Any) -> Any:
    """A value that is not JSON's as one that is, or is nearer to it: orjson asks again about what is inside."""
    if hasattr(value, "get_secret_value"):  # pydantic's SecretStr, SecretBytes and Secret
        return HIDDEN
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[:MAX_TEXT]).decode("utf-8", "backslashreplace")
    if isinstance(value, type):
        return _kind_name(value)
    if isinstance(value, BaseException):
        return f"{_kind(value)}: {text_of(value)}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=False))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(islice(value, MAX_ITEMS))
    shown = _shown_fields(value)
    if shown is not None:
        return {name: getattr(value, name) for name in shown}
    return text_of(value)


def _shown_fields(value: Any) -> list[str] | None:
    """The fields that its class shows in its repr, of a dataclass, a pydantic model or an attrs class."""
    if is_dataclass(value):
        return [field.name for field in fields(value) if field.repr]
    kind = type(value)
    if hasattr(kind, "__pydantic_fields__"):
        known = [name for name, field in kind.__pydantic_fields__.items() if getattr(field, "repr", True)]
        return [*known, *(getattr(value, "model_extra", None) or ())]
    if hasattr(kind, "__attrs_attrs__"):
        return [field.name for field in kind.__attrs_attrs__ if field.repr]
    return None


def _walked(value: Any, outer: tuple[int, ...], depth: int) -> Any:
    """The value made of nothing but JSON's kinds, cut where it is too deep, too wide, or contains itself."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Enum) and type(value.value) is not type(value):
        return _walked(value.value, outer, depth)
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, int):
        return int(value) if _SMALLEST <= value <= _LARGEST else cut(_digits(value), MAX_TEXT)
    if isinstance(value, float):
        return float(value)  # not a number and infinities are null, as orjson has it
    if id(value) in outer:
        return "[circular]"
    if depth <= 0:
        return TRUNCATED
    try:
        return _inside(value, (*outer, id(value)), depth - 1)
    except Exception:
        return f"<unprintable {_kind(value)}>"


def _inside(value: Any, outer: tuple[int, ...], depth: int) -> Any:
    if type(value) not in (dict, list, tuple):
        nearer = _natively(value)
        return nearer if isinstance(nearer, str) else _walked(nearer, outer, depth)
    if isinstance(value, dict):
        walked = {_key(key): _walked(inner, outer, depth) for key, inner in islice(value.items(), MAX_ITEMS)}
        return walked if len(value) <= MAX_ITEMS else {**walked, TRUNCATED: len(value) - MAX_ITEMS}
    items: Iterable[Any] = islice(value, MAX_ITEMS)
    listed = [_walked(inner, outer, depth) for inner in items]
    return listed if len(value) <= MAX_ITEMS else [*listed, TRUNCATED]


def _natively(value: Any) -> Any:
    """What orjson makes of it by itself (times, UUIDs), else what we do."""
    try:
        return orjson.loads(orjson.dumps(value, option=_OPTIONS))
    except Exception:
        return simple(value)


def _key(key: Any) -> str:
    if isinstance(key, Enum):
        key = key.value
    if key is None or type(key) is bool:
        return str(key).lower().replace("none", "null")
    if isinstance(key, int):
        return _digits(key)
    return text_of(simple(key) if isinstance(key, (bytes, bytearray)) else key)


def _digits(number: int) -> str:
    try:
        return str(int(number))
    except ValueError:  # Python writes no more than 4,300 digits
        return hex(number)


def _kind(value: Any) -> str:
    return _kind_name(type(value))


def _kind_name(kind: type) -> str:
    try:
        return str(kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")
    except Exception:
        return "object"
