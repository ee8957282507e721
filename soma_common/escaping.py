"""What others wrote, on a terminal: nothing in it steers that. All that commands print of it goes through here."""

from __future__ import annotations

from typing import Any

import orjson

from soma_common.logging.text import plain as plain


def json_text(value: Any, *, indent: bool = False) -> str:
    """JSON in which nothing steers a terminal: orjson escapes what is below a space, and no other control characters,
    bidirectional ones for instance. Such ones stand in strings only, so the text says the same."""
    options = orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if indent else 0)
    return json_escaped(orjson.dumps(value, default=str, option=options).decode())


def json_escaped(text: str) -> str:
    """JSON that is written already, so that nothing in it steers anything; it says the same."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    """A character as JSON may write it."""
    if character.isprintable() or character == "\n":  # orjson's own line breaks; those of strings are escaped already
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
