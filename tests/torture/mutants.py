"""The library broken on purpose, one promise at a time. Nothing here touches the library's files."""

from __future__ import annotations


def apply(name: str | None) -> None:
    """Break this process as the mutant says; None: leave it whole."""
