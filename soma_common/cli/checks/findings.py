"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from soma_common.errors import SomaError


class Area(StrEnum):
    """What checks are about, in the order in which they are told."""

    SETTINGS = "settings"
    MACHINE = "machine"
    DATABASE = "database"
    KAFKA = "kafka"
    REGISTRY = "registry"
    WORK = "work"


class Level(StrEnum):
    """How it stands. ``SKIPPED``: it could not be looked at, for a reason that is another finding."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """A check by its name, and what it found."""

    check: str
    level: Level
    text: str
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """From when on something is worth a word. Times are seconds.

    Args:
        old: a transaction, a prepared one, or a row that waits for the relay.
        within: for one question to a server.
        free: bytes of disk.
        skew: between two clocks.
    """

    old: float = 300.0
    within: float = 5.0
    free: int = 1024 * 1024 * 1024
    skew: float = 1.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: an environment, and the limits."""

    env: Mapping[str, str]
    limits: Limits


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, cure: str) -> Finding:
    """It works, and should be looked at."""
    return Finding(check, Level.WARN, text, cure)


def fail(check: str, text: str, cure: str | None) -> Finding:
    """It does not work, or will not."""
    return Finding(check, Level.FAIL, text, cure)


def skipped(check: str, why: str) -> Finding:
    """It could not be looked at."""
    return Finding(check, Level.SKIPPED, why)


def failed(check: str, error: SomaError) -> Finding:
    """An error of the library, as a finding."""
    return Finding(check, Level.FAIL, error.message, error.cure)


_EXIT: Final = {Level.FAIL: 2, Level.WARN: 1}


def exit_code(findings: list[Finding]) -> int:
    """2: something failed, 1: something is to be looked at, 0: neither."""
    return max((_EXIT.get(finding.level, 0) for finding in findings), default=0)
