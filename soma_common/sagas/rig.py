"""What of a worker's surroundings a test may hold in its hand: the clock, and the points between which it may die."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from soma_common.sagas.context import SagaContext


class Point(StrEnum):
    """Moments of an attempt. Between any two of them a worker may die.

    ``before-commit`` is of transactional steps alone: everything is written, and nothing is durable.
    """

    BEFORE_EFFECT = "before-effect"
    AFTER_EFFECT = "after-effect"
    BEFORE_RECORD = "before-record"
    BEFORE_COMMIT = "before-commit"
    AFTER_COMMIT = "after-commit"


Probe = Callable[[Point, SagaContext], Awaitable[None]]


async def _pass(point: Point, context: SagaContext) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class Rig:
    """``now``: the monotonic clock, in seconds. ``probe``: is called at every point of every attempt, and may fail."""

    now: Callable[[], float] = time.monotonic
    probe: Probe = _pass


REAL = Rig()
