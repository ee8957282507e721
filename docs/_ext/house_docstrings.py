"""Docstrings as this house writes them: an indented block that stands free is code."""

from __future__ import annotations

import re
import textwrap
from ast import PyCF_ALLOW_TOP_LEVEL_AWAIT
from itertools import takewhile

from sphinx.application import Sphinx

_SECTION = re.compile(r"^(Args|Raises|Returns|Attributes|Yields|Note):$")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx. Before napoleon, which has the usual priority."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = with_code(lines)


def with_code(lines: list[str]) -> list[str]:
    """The lines, with a directive before each block of code."""
    done: list[str] = []
    in_section = in_code = False
    for place, line in enumerate(lines):
        indented = line.startswith("    ")
        free = place > 0 and not lines[place - 1].strip()
        if line.strip() and not indented:
            in_section, in_code = bool(_SECTION.match(line)), False
        if indented and free and not in_section and not in_code:
            done += [f".. code-block:: {_language(lines[place:])}", ""]
            in_code = True
        done.append(line)
    return done


def _language(rest: list[str]) -> str:
    """What a block is, from its first line on: Python, or text that is drawn."""
    block = list(takewhile(lambda line: not line.strip() or line.startswith("    "), rest))
    try:
        compile(textwrap.dedent("\n".join(block)), "docstring", "exec", flags=PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except (SyntaxError, ValueError):
        return "text"
    return "python"
