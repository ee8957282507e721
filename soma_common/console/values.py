"""Bytes and values as pages show them: text or numbers, the beginning of what is long, the whole for downloading."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Final

import orjson
from starlette.responses import Response

from soma_common.console.rendering import dumped, trimmed
from soma_common.escaping import json_escaped, json_text

_MOST_DIFF: Final = 256 * 1024  # characters of a text that is compared
_MOST_LINES: Final = 2000
_JSON: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_FILE: Final = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Shown:
    """A value on a page. ``kind``: json, text, bytes, or none. ``cut``: how much is left out."""

    kind: str
    text: str
    cut: int
    size: int

    @classmethod
    def of(cls, value: bytes | None) -> Shown:
        """As JSON where it is that, as text where it is that, else as numbers."""
        if value is None:
            return cls("none", "(null)", 0, 0)
        whole = as_json(value)
        if whole is not None:
            return cls("json", *trimmed(whole), len(value))
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            return cls("bytes", *dumped(value), len(value))
        return cls("text", *trimmed(text), len(value)) if is_text(text) else cls("bytes", *dumped(value), len(value))


def shown_bytes(value: bytes | None) -> Shown:
    """Bytes as a page shows them."""
    return Shown.of(value)


def as_json(value: bytes) -> str | None:
    """Bytes as indented JSON; None: they are none, or too much to look at."""
    if len(value) > 4 * 1024 * 1024 or value.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        orjson.loads(value)
        return indented(value.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def indented(text: str) -> str:
    """JSON with other spaces only: no number is read, and none is written anew."""
    parts, depth = [], 0
    for found in _JSON.finditer(text):
        token = found[0]
        if token in "{[":
            depth += 1
            parts.append(f"{token}\n{'  ' * depth}")
        elif token in "}]":
            depth -= 1
            empty = parts[-1].rstrip() in ("{", "[") and parts[-1].endswith("  " * (depth + 1))
            parts[-1] = parts[-1].rstrip() if empty else parts[-1]
            parts.append(token if empty else f"\n{'  ' * depth}{token}")
        else:
            parts.append({",": f",\n{'  ' * depth}", ":": ": "}.get(token, token))
    return json_escaped("".join(parts))


@dataclass(frozen=True, slots=True)
class DiffLine:
    """A line of a comparison; ``kind``: same, gone, new, or gap."""

    kind: str
    text: str


def compared(before: str, after: str) -> list[DiffLine] | None:
    """Two texts line by line, what is far from every change left out; None: they are too long to compare."""
    if max(len(before), len(after)) > _MOST_DIFF or max(before.count("\n"), after.count("\n")) > _MOST_LINES:
        return None
    kinds = {"+": "new", "-": "gone", " ": "same", "@": "gap"}
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=3)
    return [DiffLine(kinds[line[0]], "" if line[0] == "@" else line[1:]) for line in list(lines)[2:]]


def download(content: bytes, name: str, kind: str = "application/octet-stream") -> Response:
    """A file for saving: no browser shows it."""
    safe = _FILE.sub("-", name)[:100]
    return Response(content, media_type=kind, headers={"content-disposition": f'attachment; filename="{safe}"'})


def plain_json(value: Any) -> str:
    """A value as indented JSON, as text."""
    return json_text(value, indent=True)


def is_text(text: str) -> bool:
    """Whether a form can show a text and get it back as it was."""
    return all(c.isprintable() or c in "\n\t" for c in text)
