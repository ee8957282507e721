"""How long a transaction may be."""

from __future__ import annotations

from typing import Final, NamedTuple

_MOST_MILLISECONDS: Final = 2**31 - 1  # what PostgreSQL's settings take


class Bound(NamedTuple):
    """When PostgreSQL ends a transaction: seconds of ``silence`` between two statements, and of the ``whole``.

    Before version 17 there is no bound on the whole: a process that is paused amid a statement is not noticed there.
    """

    silence: float
    whole: float


SHORT: Final = Bound(silence=5.0, whole=60.0)
"""Of the library's own transactions."""


def milliseconds(seconds: float) -> str:
    """A time as PostgreSQL's settings have it."""
    return f"{min(_MOST_MILLISECONDS, max(1, int(seconds * 1000)))}ms"
