"""Moments and spans of time, as people write and read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

TIMES: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z"]
"""How options take a moment."""
_UNITS: Final = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"))


def utc(moment: datetime | None) -> datetime | None:
    """A moment; in UTC, unless it has an offset."""
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def stamp(moment: datetime) -> str:
    """A moment to the second, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def span(length: timedelta | float) -> str:
    """A length of time, in the unit in which people say it: ``5 s``, ``3 min``, ``2 h``, ``4 d``."""
    seconds = max(0.0, length.total_seconds() if isinstance(length, timedelta) else length)
    for size, unit in _UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def took(seconds: float) -> str:
    """How long something took, in two or three digits."""
    if seconds < 1:
        return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else span(seconds)
