"""Pages from templates. What others wrote is escaped, and can steer neither browser nor reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from soma_common.escaping import json_text, plain
from soma_common.moments import span, took

MOST_SHOWN: Final = 64 * 1024  # characters of a value on a page
_MOST_BYTES: Final = 4 * 1024  # bytes in a dump
_TOKEN: Final = re.compile(
    r'(?P<key>"(?:[^"\\]|\\.)*"(?=:))|(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>-?\b\d[\d.eE+-]*)|(?P<word>\b(?:true|false|null)\b)'
)


@cache
def environment() -> Environment:
    """The templates, with what they may use."""
    made = Environment(
        loader=PackageLoader("soma_common.console", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters.update(
        ago=ago, moment=moment, clock=clock, number=number, about=about, took=took, short=short, coloured=coloured,
    )  # fmt: skip
    made.globals.update(assets=_assets())
    return made


def _assets() -> str:
    """A number of the static files, by which browsers notice that they changed."""
    folder = files("soma_common.console").joinpath("static")
    return sha256(b"".join(folder.joinpath(name).read_bytes() for name in ("console.css", "console.js"))).hexdigest()[
        :10
    ]


def render(name: str, values: Mapping[str, Any]) -> str:
    """A page, or a part of one."""
    return environment().get_template(name).render(values)


def query(path: str, **given: Any) -> str:
    """A path with what is asked of it; what is None or empty is left out."""
    pairs = [
        (name, each.isoformat() if isinstance(each, datetime) else str(each))
        for name, value in given.items()
        for each in (value if isinstance(value, list | tuple) else [value])
        if each is not None and each != ""
    ]
    return f"{path}?{urlencode(pairs, errors='replace')}" if pairs else path


def moment(at: datetime | None) -> str:
    """A moment to the second, in UTC."""
    return "" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def clock(at: datetime) -> str:
    """The time of the day to the millisecond, in UTC."""
    return f"{at.astimezone(UTC):%H:%M:%S.%f}"[:-3]


def ago(at: datetime | None, now: datetime | None = None) -> Markup:
    """How long ago a moment is; with the moment itself, for those who point at it."""
    if at is None:
        return Markup("–")
    since = (now or datetime.now(UTC)) - at
    told = f"{span(since)} ago" if since >= timedelta() else f"in {span(-since)}"
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(at.isoformat(), moment(at), told)


def number(value: float | None) -> str:
    """A number with its thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:,.1f}"


def about(count: int, bound: int) -> str:
    """A count that went no further than its bound."""
    return f"{count:,}" if count < bound else f"{bound - 1:,}+"


def short(text: Any, most: int = 80) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(str("" if text is None else text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def coloured(value: Any) -> Markup:
    """A value as indented JSON, or a text that is JSON already: keys, texts and numbers each in their colour."""
    text, cut = trimmed(value if isinstance(value, str) else json_text(value, indent=True))
    parts, end = [], 0
    for found in _TOKEN.finditer(text):
        parts += [
            escape(text[end : found.start()]),
            Markup('<span class="j-{}">{}</span>').format(found.lastgroup, found[0]),
        ]
        end = found.end()
    more = Markup('\n<span class="cut">… {} more characters</span>').format(number(cut)) if cut else ""
    return Markup("").join([*parts, escape(text[end:]), more])


def trimmed(text: str) -> tuple[str, int]:
    """Text as long as a page takes, and how many characters are left out."""
    return (plain(text[:MOST_SHOWN], lines=True), max(0, len(text) - MOST_SHOWN))


def dumped(value: bytes) -> tuple[str, int]:
    """Bytes as numbers and letters, sixteen a line, and how many are left out."""
    lines = []
    for at in range(0, min(len(value), _MOST_BYTES), 16):
        part = value[at : at + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in part)
        lines.append(f"{at:06x}  {part.hex(' '):<47}  {letters}")
    return "\n".join(lines), max(0, len(value) - _MOST_BYTES)


def _shown(value: Any) -> Any:
    """What a template prints: control and bidirectional characters stand as escapes."""
    if isinstance(value, Markup):
        return value
    return plain(value, lines=True) if isinstance(value, str) else value
