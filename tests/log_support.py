"""Log records for tests, and what a line must be."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIELDS = ("timestamp", "level", "service", "logger", "message", "trace_id", "correlation_id", "tenant_id", "data")
OPTIONAL = {"span_id", "category", "exception", "stack"}
HEAD = re.compile(r"\S+ \d\d:\d\d:\d\d\.\d{3} \[[^\n]+\]( 🔗[^\n]{1,90}| trace=[^\n]{1,90})? [^\n]*")


def record(message: Any = "said", *args: Any, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    """A record as a logger makes it; keywords are ``extra=`` and attributes."""
    made = logging.LogRecord("app.orders", level, __file__, 1, message, args, fields.pop("exc_info", None))
    made.__dict__.update(fields)
    return made


def raised(error: BaseException) -> Any:
    """The ``exc_info`` of an error that was raised."""
    try:
        raise error
    except BaseException:
        return sys.exc_info()


def parsed(line: str, limit: int = 16_000) -> dict[str, Any]:
    """The JSON of a line, which must be one, in printable ASCII, with the fields of every line (property 28.1)."""
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= limit
    found: dict[str, Any] = json.loads(line, parse_constant=_refused, object_pairs_hook=_no_repeats)
    assert set(FIELDS) <= found.keys() <= {*FIELDS, *OPTIONAL}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", found["timestamp"])
    for name in ("level", "service", "logger", "message"):
        assert isinstance(found[name], str), name
    for name in ("trace_id", "correlation_id", "tenant_id"):
        assert found[name] is None or isinstance(found[name], str), name
    assert isinstance(found["data"], dict)
    return found


def check_console(text: str, *, encoding: str = "utf-8") -> list[str]:
    """The lines of a record on the console: the first has the shape, no other can be taken for one (property 28.2)."""
    text.encode(encoding)
    first, *rest = text.split("\n")
    assert HEAD.fullmatch(first), first
    for line in (first, *rest):
        assert line.replace("\t", " ").isprintable(), line
    assert all(line.startswith("    ") for line in rest)
    return [first, *rest]


def python(script: str, *, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    given = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "SOMA_SERVICE_ID")
    }
    given |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TZ": "UTC", **(env or {})}
    options = {"encoding": "utf-8", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60} | options
    return subprocess.run([sys.executable, "-c", script], env=given, check=False, **options)


def _refused(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key twice"
    return dict(pairs)
