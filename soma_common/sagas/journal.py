"""What happened to a saga, as it stands in its journal, and what follows from it for each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final


class What(StrEnum):
    """What an entry of the journal says of a step, or of the whole saga.

    Of a step: ``begun`` (an external one whose policy needs to know), ``waiting``, ``done``, ``skipped``, ``retrying``
    (an attempt failed, another follows), ``unknown`` (nobody knows whether it took effect; with ``due_in`` another
    attempt follows), ``failed`` (for good).
    Of its compensation: ``undone``, ``undo-skipped``, ``undo-retrying``, ``undo-failed``. Of the saga: ``turned``,
    ``stuck``, ``ended``. What people asked for: ``retry``, ``compensate``, ``cancel``.
    """

    BEGUN = "begun"
    WAITING = "waiting"
    DONE = "done"
    SKIPPED = "skipped"
    RETRYING = "retrying"
    UNKNOWN = "unknown"
    FAILED = "failed"
    UNDONE = "undone"
    UNDO_SKIPPED = "undo-skipped"
    UNDO_RETRYING = "undo-retrying"
    UNDO_FAILED = "undo-failed"
    TURNED = "turned"
    STUCK = "stuck"
    ENDED = "ended"
    RETRY = "retry"
    COMPENSATE = "compensate"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a journal. ``step`` is a path, empty for the whole saga; ``result`` is JSON.

    ``due_in``: seconds until the next attempt is made, or a wait ends. ``took``: seconds. ``who`` and ``why`` are of
    people.
    """

    what: What
    step: str = ""
    attempt: int = 0
    result: bytes | None = None
    error_type: str | None = None
    error: str | None = None
    stack: str | None = None
    due_in: float | None = None
    took: float | None = None
    who: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class StepState:
    """Where a step stands. ``again``: a person wants another try, though nobody knows of the last one.

    ``failures`` and ``undo_failures``: since it was last asked to be tried again. ``attempts``: ever, so that each has
    a number of its own. ``unknown``: nobody knows whether its last attempt took effect. ``due``: as the entry said.
    """

    begun: bool = False
    done: bool = False
    skipped: bool = False
    failed: bool = False
    unknown: bool = False
    again: bool = False
    failures: int = 0
    attempts: int = 0
    undone: bool = False
    undo_failed: bool = False
    undo_failures: int = 0
    undo_attempts: int = 0
    result: bytes | None = None
    due: float | None = None

    @property
    def passed(self) -> bool:
        """Whether what follows it may begin."""
        return self.done or self.skipped


NOTHING: Final = StepState()
_OPEN: Final[dict[str, Any]] = {
    "failed": False,
    "unknown": False,
    "again": False,
    "begun": False,
    "failures": 0,
    "due": None,
}


@dataclass(frozen=True, slots=True)
class Journal:
    """All entries of a saga, folded. ``first_failed`` is the step that failed first; ``stuck`` the one it hangs on."""

    steps: Mapping[str, StepState] = field(default_factory=lambda: MappingProxyType({}))
    turned: bool = False
    first_failed: str | None = None
    length: int = 0

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Journal:
        """Fold entries in their order."""
        return cls().after(*entries)

    def of_step(self, path: str) -> StepState:
        """The state of a step; of one that never began, too."""
        return self.steps.get(path, NOTHING)

    def after(self, *entries: Entry) -> Journal:
        """With entries added."""
        steps, turned, first, length = dict(self.steps), self.turned, self.first_failed, self.length
        for entry in entries:
            length += 1
            if entry.what is What.TURNED:
                turned = True
                steps = {path: replace(state, due=None) for path, state in steps.items()}  # nothing forward is due
            if entry.step:
                steps[entry.step] = _fold(steps.get(entry.step, NOTHING), entry)
                first = first or (entry.step if entry.what is What.FAILED else None)
                if entry.what is What.RETRY and first == entry.step:
                    first = None
        return Journal(MappingProxyType(steps), turned, first, length)


def _fold(state: StepState, entry: Entry) -> StepState:
    match entry.what:
        case What.BEGUN:
            return replace(state, begun=True)
        case What.WAITING:
            return replace(state, begun=True, due=entry.due_in)
        case What.DONE if state is NOTHING:  # most steps: at their first attempt
            return StepState(done=True, result=entry.result, attempts=entry.attempt)
        case What.DONE:
            return replace(state, **_OPEN, done=True, result=entry.result, attempts=entry.attempt)
        case What.SKIPPED:
            return replace(state, **_OPEN, skipped=True)
        case What.RETRYING:
            return _tried(state, entry, unknown=state.unknown)  # it tells of its own attempt, not of those before
        case What.UNKNOWN:
            return replace(_tried(state, entry, unknown=True), again=False)
        case What.FAILED:
            return replace(state, begun=False, failed=True, failures=state.failures + 1, attempts=entry.attempt)
        case What.UNDONE | What.UNDO_SKIPPED:
            return replace(state, undone=True, due=None)
        case What.UNDO_RETRYING | What.UNDO_FAILED:
            failed = entry.what is What.UNDO_FAILED
            return replace(
                state, undo_failures=state.undo_failures + 1, undo_attempts=entry.attempt, undo_failed=failed,
                due=entry.due_in,
            )  # fmt: skip
        case What.RETRY if state.undo_failed:  # of its compensation; what is known of the step stays
            return replace(state, undo_failed=False, undo_failures=0, due=None)
        case What.RETRY:  # what is not known of the last attempt is not known now
            return replace(state, **{**_OPEN, "unknown": state.unknown, "again": state.unknown})
        case _:
            return state


def _tried(state: StepState, entry: Entry, *, unknown: bool) -> StepState:
    return replace(
        state, begun=False, unknown=unknown, failures=state.failures + 1, attempts=entry.attempt, due=entry.due_in
    )
