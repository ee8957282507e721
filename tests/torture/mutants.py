"""The library broken on purpose, one promise at a time. Nothing here touches the library's files."""

from __future__ import annotations


def apply(name: str | None) -> None:
    """Break this process as the mutant says; None: leave it whole."""


MUTANTS: dict[str, str] = {}


def main(names: list[str]) -> int:
    """Run mutants; 0 when each is caught."""
    return 0
