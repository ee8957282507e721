"""The client's clock, as a value that can be replaced: the database's own clock is ``soma.now()``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Clock = Callable[[], datetime]

MICROSECOND = timedelta(microseconds=1)


def utc_now() -> datetime:
    """The time now, in UTC, with PostgreSQL's resolution of one microsecond."""
    return datetime.now(UTC)
