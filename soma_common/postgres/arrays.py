"""Lists as PostgreSQL's array literals, for psycopg.

psycopg asks for each element of a list how to write it, and gives the statement another type, so another plan, for
another width of integers. Our statements name the types of their parameters; a literal leaves only joining.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any


def array_literal(values: Sequence[Any]) -> str:
    """The literal of a one-dimensional array of text, bytes, times, ids, numbers or booleans."""
    return "{" + ",".join(["NULL" if value is None else _element(value) for value in values]) + "}"


def literals(args: Sequence[Any]) -> list[Any]:
    """Parameters of a statement with its lists as literals."""
    return [array_literal(value) if type(value) is list else value for value in args]


def _element(value: Any) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\") if "\\" in value else value
        if '"' in escaped:
            escaped = escaped.replace('"', '\\"')
        return '"' + escaped + '"'  # adding: formatting would ask an enum for its name
    if isinstance(value, bytes | bytearray | memoryview):
        return f'"\\\\x{value.hex()}"'
    if isinstance(value, datetime):
        return f'"{value.isoformat()}"'
    return str(value)
