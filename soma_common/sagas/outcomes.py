"""What the outcome of one attempt means: the entries that follow from it. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from soma_common.dlq.failures import Failure, Stage
from soma_common.errors import OutcomeUnknown, StepRefused, ValidationError
from soma_common.sagas.journal import Entry, StepState, What
from soma_common.sagas.machine import Work
from soma_common.sagas.steps import SagaStep, Unknown


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that failed.

    ``unknown``: it may have taken effect nevertheless. ``took``: seconds. ``final``: another try is of no use.
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
        return [entry_of(What.RETRYING if again else What.FAILED, work, state.attempts, failure, due_in)]
    if part.unknown is Unknown.ASK:
        return [entry_of(What.UNKNOWN, work, state.attempts, failure)]
    if part.unknown is Unknown.COMPENSATE and not one_way:
        again = False
    unknown = entry_of(What.UNKNOWN, work, state.attempts, failure, due_in if again else None)
    return [unknown] if again else [unknown, entry_of(What.FAILED, work, state.attempts, failure)]


def _undo_failed(work: Work, state: StepState, failure: Failed) -> Entry:
    policy = work.part.undo
    again = state.undo_failures < policy.max_retries and not failure.final
    what = What.UNDO_RETRYING if again else What.UNDO_FAILED
    return entry_of(
        what, work, state.undo_attempts, failure, policy.retry.delay(state.undo_failures) if again else None
    )


def entry_of(what: What, work: Work, attempts: int, failure: Failed, due_in: float | None = None) -> Entry:
    """The entry of a failure, after so many attempts before it."""
    told = Failure.of(Stage.HANDLE, failure.error)
    return Entry(
        what=what, step=work.path, attempt=attempts + 1, due_in=due_in, took=failure.took,
        error_type=told.error_type, error=told.message, stack=told.stack if due_in is None else None,
    )  # fmt: skip
