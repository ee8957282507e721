"""What becomes of an event that failed: tried again in its lane, parked in the database, or dead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from soma_common.dlq.failures import Stage
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import (
    ClockAhead,
    CodecError,
    ConfigurationError,
    InfrastructureError,
    PoisonEvent,
    TransactionConflict,
    ValidationError,
)
from soma_common.ranges import check_settings
from soma_common.retry import Backoff


class ErrorClass(StrEnum):
    """What an error says about the next try.

    ``transient``: it may go better; tried a few times, then parked. ``fatal``: it will fail the same way; dead at
    once. ``infrastructure``: something is away; tried until it is back, and never counted. ``conflict``: two
    transactions met; tried at once, with fewer lanes, and transient after twenty in a row.
    """

    TRANSIENT = "transient"
    FATAL = "fatal"
    INFRASTRUCTURE = "infrastructure"
    CONFLICT = "conflict"


_KNOWN: Final[tuple[tuple[type[BaseException], ErrorClass], ...]] = (
    (TransactionConflict, ErrorClass.CONFLICT),
    (InfrastructureError, ErrorClass.INFRASTRUCTURE),
    (ClockAhead, ErrorClass.INFRASTRUCTURE),
    (ValidationError, ErrorClass.FATAL),
    (CodecError, ErrorClass.FATAL),
    (PoisonEvent, ErrorClass.FATAL),
)


@dataclass(frozen=True, slots=True)
class Next:
    """What to do with a failed event: try again in ``wait`` seconds; or (None) park it.

    ``retry_in`` and ``left`` are of the parked letter: seconds until its first automatic try (None: it is dead), and
    how many more follow.
    """

    wait: float | None
    retry_in: float | None = None
    left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When and how often a failing event is tried again.

    Args:
        tries: how often an event is tried in its lane, the first time included. Its key waits meanwhile.
        backoff: waits between those tries, with full jitter.
        parked: automatic tries of an event that is parked after them; then it is dead and waits for a person.
        classes: the class of errors that the library does not know, by type; subclasses follow, the nearest wins.
            What is named here goes before what the library says.
        away: waits between tries while an infrastructure error lasts.
    """

    tries: int = 4
    backoff: Backoff = field(default_factory=lambda: Backoff(base=0.2, maximum=5.0))
    parked: RedrivePolicy = field(default_factory=lambda: RedrivePolicy(after=60.0, tries=4, factor=5.0))
    classes: Mapping[type[BaseException], ErrorClass] = field(default_factory=dict)
    away: Backoff = field(default_factory=lambda: Backoff(base=0.2, maximum=10.0))

    def __post_init__(self) -> None:
        check_settings(
            self, tries=(1, 100), backoff=Backoff, parked=RedrivePolicy, away=Backoff, classes=Mapping,
        )  # fmt: skip
        for kind, known in self.classes.items():
            if not (isinstance(kind, type) and issubclass(kind, BaseException) and isinstance(known, ErrorClass)):
                raise ConfigurationError(f"{kind!r}: {known!r} is no class of an error.", cure="name an ErrorClass.")

    def classify(self, error: BaseException) -> ErrorClass:
        """The class of an error."""
        for kind in type(error).__mro__:
            if kind in self.classes:
                return self.classes[kind]
        for kind, known in _KNOWN:
            if isinstance(error, kind):
                return known
        return ErrorClass.TRANSIENT

    def next(self, error: BaseException, stage: Stage, failures: int, outages: int) -> Next:
        """What to do after so many failures, of which infrastructure's are counted apart."""
        known = self.classify(error)
        if known is ErrorClass.INFRASTRUCTURE:
            return Next(self.away.delay(outages))
        if known is ErrorClass.FATAL or stage is Stage.DECODE:
            return Next(None)
        if failures < self.tries:
            return Next(self.backoff.delay(failures - 1))
        return Next(None, self.parked.delay(self.parked.tries), max(0, self.parked.tries - 1))


def stage_of(error: BaseException) -> Stage:
    """Where an event failed, by its error."""
    if isinstance(error, CodecError):
        return Stage.DECODE
    return Stage.VALIDATE if isinstance(error, ValidationError) else Stage.HANDLE
