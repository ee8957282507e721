"""What a console line begins with: an emoji for its level, or for what it is about; ASCII where there are none."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import Any, Final, NamedTuple

from soma_common.logging.levels import SUCCESS
from soma_common.logging.values import text_of


class Marker(NamedTuple):
    """An emoji, and what stands for it where a stream cannot show it."""

    emoji: str
    ascii: str


LEVELS: Final[Mapping[int, Marker]] = {
    logging.CRITICAL: Marker("❌", "x"),
    logging.ERROR: Marker("❌", "x"),
    logging.WARNING: Marker("⚠️", "!"),
    SUCCESS: Marker("✅", "+"),
    logging.INFO: Marker("ℹ️", "i"),
    logging.DEBUG: Marker("🔍", "."),
}

CATEGORIES: Final[Mapping[str, Marker]] = {
    "COGNITIVE": Marker("🧠", "cognitive"),
    "AGENT": Marker("🤖", "agent"),
    "MEMORY": Marker("💾", "memory"),
    "VOICE": Marker("🎤", "voice"),
    "IN_PROGRESS": Marker("🔄", "progress"),
    "TIMING": Marker("⏱️", "timing"),
    "TRACE": Marker("🔗", "trace"),
    "EVENT": Marker("📨", "event"),
    "DATABASE": Marker("🗄️", "database"),
    "TXN": Marker("⚡", "txn"),
    "SAGA": Marker("🎭", "saga"),
    "DLQ": Marker("🗄️", "dlq"),
    "SUCCESS": LEVELS[SUCCESS],
}

TRACE_LINK: Final = CATEGORIES["TRACE"]


def category_of(extras: Mapping[str, Any], known: Container[str] = CATEGORIES) -> str | None:
    """What a record is about: its ``category``, else by its ``event_type`` (``memory.stored`` is MEMORY, an unknown
    family is EVENT), else None.
    """
    given = extras.get("category")
    if given is not None:
        return text_of(getattr(given, "value", given))[:100].upper()
    event_type = extras.get("event_type")
    if event_type is None:
        return None
    family = text_of(getattr(event_type, "value", event_type)).partition(".")[0].upper()
    return family if family in known else "EVENT"


def marker_of(level: int, category: str | None, known: Mapping[str, Marker] = CATEGORIES) -> Marker:
    """A category's marker; from WARNING on the level's, for that there is a problem matters more than where."""
    if category is not None and level < logging.WARNING and category in known:
        return known[category]
    return LEVELS.get(level) or next((mark for floor, mark in LEVELS.items() if level >= floor), LEVELS[logging.DEBUG])
