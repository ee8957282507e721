"""What the outcome of one attempt means: the entries that follow from it. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from soma_common.dlq.failures import storable
from soma_common.errors import OutcomeUnknown, StepRefused, ValidationError
from soma_common.sagas.journal import Entry, StepState, What
from soma_common.sagas.machine import Work
from soma_common.sagas.steps import SagaStep, Unknown

_MOST_TYPE: Final = 512  # bytes
_MOST_MESSAGE: Final = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that failed.

    ``unknown``: it may have taken effect nevertheless. ``took``: seconds. ``final``: another attempt would be of no use.
    """

    error: BaseException
    unknown: bool
    took: float
    final: bool = False


def failed(work: Work, error: BaseException, took: float, *, transactional: bool) -> Failed:
    """What an error in an attempt says. The effects of a transactional step are rolled back, so they are known."""
    fatal = work.part.fatal if isinstance(work.part, SagaStep) else ()
    unknown = not transactional and isinstance(error, OutcomeUnknown | TimeoutError)
    return Failed(error, unknown, took, isinstance(error, (StepRefused, ValidationError, *fatal)))


def entries_of(work: Work, state: StepState, failure: Failed, *, one_way: bool) -> list[Entry]:
    """The entries of a failed attempt.

    ``one_way``: the saga is behind its pivot. What is unknown there cannot be undone, and is tried again.
    """
    if work.undo:
        return [_undo_failed(work, state, failure)]
    part = work.part
    again = state.failures < part.max_retries and not failure.final
    due_in = part.retry.delay(state.failures) if again else None
    if not failure.unknown:
        return [_entry(What.RETRYING if again else What.FAILED, work, state.attempts, failure, due_in)]
    if part.unknown is Unknown.ASK:
        return [_entry(What.UNKNOWN, work, state.attempts, failure)]
    if part.unknown is Unknown.COMPENSATE and not one_way:
        again = False
    unknown = _entry(What.UNKNOWN, work, state.attempts, failure, due_in if again else None)
    return [unknown] if again else [unknown, _entry(What.FAILED, work, state.attempts, failure)]


def _undo_failed(work: Work, state: StepState, failure: Failed) -> Entry:
    policy = work.part.undo
    again = state.undo_failures < policy.max_retries and not failure.final
    what = What.UNDO_RETRYING if again else What.UNDO_FAILED
    return _entry(what, work, state.undo_attempts, failure, policy.retry.delay(state.undo_failures) if again else None)


def _entry(what: What, work: Work, attempts: int, failure: Failed, due_in: float | None = None) -> Entry:
    kind = type(failure.error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(failure.error)
    except Exception as broken:  # a __str__ of somebody else must not hide the failure
        message = f"(the message cannot be read: {type(broken).__name__})"
    return Entry(
        what=what, step=work.path, attempt=attempts + 1, due_in=due_in, took=failure.took,
        error_type=storable(name, _MOST_TYPE), error=storable(message, _MOST_MESSAGE),
    )  # fmt: skip
