"""Text that others wrote, made fit for a line: nothing in it steers a terminal, and it is cut where a person would."""

from __future__ import annotations

import unicodedata
from typing import Final

TRUNCATED: Final = "[truncated]"

_JOINER: Final = "\u200d"
_SKIN_TONES: Final = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS: Final = range(0x1F1E6, 0x1F200)
_LONGEST_CHARACTER: Final = 32  # code points; text may be nothing but accents


def plain(text: str, *, lines: bool = False) -> str:
    """Text without control and bidirectional characters: they are written as escapes. With ``lines``, line breaks and
    tabs stay.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str, limit: int) -> str:
    """The first ``limit`` code points and ``[truncated]``, or the text itself where it is not longer.

    It is never cut inside of what a reader sees as one character: accents stay with their letter, the parts of an
    emoji with each other. At most 32 code points less are kept for that.
    """
    if len(text) <= limit:
        return text
    return text[: _boundary(text, limit)] + TRUNCATED


def cut_middle(text: str, limit: int) -> str:
    """As ``cut``, but what is left out is the middle: a traceback begins with the cause and ends with the error."""
    if len(text) <= limit:
        return text
    start = _boundary(text, limit // 3)
    end = _boundary(text, len(text) - (limit - limit // 3))
    return text[:start] + TRUNCATED + text[end:]


def _boundary(text: str, at: int) -> int:
    """The last place up to ``at`` that is between two characters."""
    lowest = max(0, at - _LONGEST_CHARACTER)
    for place in range(at, lowest, -1):
        if not _within(text, place):
            return place
    return at if lowest or _within(text, at) else lowest


def _within(text: str, place: int) -> bool:
    """Whether a cut there is inside of one character (the common part of Unicode's rules for grapheme clusters)."""
    before, after = text[place - 1 : place], text[place : place + 1]
    if not before or not after:
        return False
    if after == _JOINER or before == _JOINER or (before == "\r" and after == "\n"):
        return True
    if unicodedata.category(after) in ("Mn", "Mc", "Me") or ord(after) in _SKIN_TONES:
        return True
    if ord(after) in _FLAG_LETTERS and ord(before) in _FLAG_LETTERS:  # two letters are one flag
        letters = 0
        while letters < place and ord(text[place - 1 - letters]) in _FLAG_LETTERS:
            letters += 1
        return letters % 2 == 1
    return False
