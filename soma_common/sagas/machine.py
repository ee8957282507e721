"""What a saga does next: its definition and its journal in, a decision out. No I/O, no clock, no state of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

import orjson

from soma_common.sagas.journal import NOTHING, Journal, StepState
from soma_common.sagas.models import Saga
from soma_common.sagas.steps import Ask, ForEach, Parallel, Part, SagaStep, SubSaga, Unknown, When


class Work(NamedTuple):
    """A step to do, or to undo. ``prefix`` are the loops and sub-sagas around it, the outermost first; the last
    sub-saga among them has ``inside`` of them around it, itself included."""

    saga: Saga
    part: Any
    prefix: tuple[str, ...]
    inside: int
    undo: bool = False

    @property
    def path(self) -> str:
        """Where it stands in the journal."""
        return "/".join((*self.prefix, self.part.name)) if self.prefix else self.part.name


class End(StrEnum):
    """How a saga ends, or why it does not go on by itself."""

    COMPLETED = "completed"
    COMPENSATED = "compensated"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. With nothing to begin, no turn and no end: wait for what is at work.

    ``begin``: may be under way at once; what is already stays so. ``turn``: go back from now on. ``reason``: the step
    because of which it turns or is stuck; None where somebody asked for it.
    """

    begin: tuple[Work, ...] = ()
    turn: bool = False
    end: End | None = None
    reason: str | None = None


_WAIT: Final = Decision()


class _Front(NamedTuple):
    """How far a series of parts has come."""

    done: bool
    open: tuple[Work, ...] = ()
    failed: tuple[str, ...] = ()
    asking: tuple[str, ...] = ()  # nobody knows whether these took effect, and people are to say it


_DONE: Final = _Front(True)


def decide(
    saga: Saga, journal: Journal, *, turn_wanted: bool = False, doubtful: Collection[str] = (), at_work: bool = False
) -> Decision:
    """The next thing to do.

    Args:
        turn_wanted: its deadline has passed, or somebody asked for it.
        doubtful: steps that a former worker may have been at when it died.
        at_work: whether steps are under way.
    """
    if journal.turned:
        return _WAIT if at_work else _back(saga, journal)
    front = _series(saga, saga.parts, (), 0, journal)
    one_way = is_behind_pivot(saga, journal)
    turn = bool(front.failed) or (turn_wanted and not one_way)
    if not turn and not front.asking:
        if front.done:
            return Decision(end=End.COMPLETED)
        return Decision(begin=front.open)
    # What may have happened is found out first: what is not known to be done would not be undone.
    unclear = () if front.asking else tuple(work for work in front.open if _is_unclear(work, journal, doubtful))
    if unclear:
        return Decision(begin=unclear)
    if at_work:
        return _WAIT
    if front.asking:
        return Decision(end=End.STUCK, reason=front.asking[0])
    reason = journal.first_failed
    if one_way:
        return Decision(end=End.STUCK, reason=reason)
    return Decision(turn=True, reason=reason)


def open_steps(saga: Saga, journal: Journal) -> tuple[Work, ...]:
    """The steps forward at which a worker may be, whether the saga is to turn by now or not."""
    return () if journal.turned else _series(saga, saga.parts, (), 0, journal).open


def disagreements(saga: Saga, journal: Journal) -> list[str]:
    """Where a journal cannot have been written under this definition; empty when it can."""
    reached = set(_reached(saga, saga.parts, (), 0, journal))
    known = {work.path for work in _every(saga, saga.parts, (), 0, journal)}
    found = []
    for path in journal.steps:
        if path not in known:
            found.append(f"the journal has {path}, which the definition does not have")
        elif path not in reached:
            found.append(f"the journal has {path}, and what stands before it in the definition is not done")
    return found


def _is_unclear(work: Work, journal: Journal, doubtful: Collection[str]) -> bool:
    """Whether a step may have taken effect, so that it must be known before the saga turns."""
    part, state = work.part, journal.of_step(work.path)
    if not isinstance(part, SagaStep):
        return False
    if part.unknown is not Unknown.RETRY:
        return state.begun or state.again
    matters = part.compensation is not None or part.pivot  # behind a pivot there is no way back
    return matters and (state.unknown or work.path in doubtful)


def _series(saga: Saga, parts: Sequence[Part], prefix: tuple[str, ...], inside: int, journal: Journal) -> _Front:
    for part in parts:
        front = _front(saga, part, prefix, inside, journal)
        if not front.done:
            return front
    return _DONE


def _front(saga: Saga, part: Part, prefix: tuple[str, ...], inside: int, journal: Journal) -> _Front:
    if isinstance(part, Parallel):
        return _together([_series(saga, branch, prefix, inside, journal) for branch in part.branches])
    work = Work(saga, part, prefix, inside)
    state = journal.of_step(work.path)
    if not state.passed:
        return _step_front(work, state)
    match part:
        case When():
            return _series(saga, _taken(part, state), prefix, inside, journal)
        case ForEach():
            return _loop(saga, part, prefix, inside, journal, state)
        case SubSaga():
            return _series(part.saga, part.saga.parts, (*prefix, part.name), len(prefix) + 1, journal)
        case _:
            return _DONE


def _step_front(work: Work, state: StepState) -> _Front:
    if state.failed:
        return _Front(False, failed=(work.path,))
    asks = isinstance(work.part, SagaStep) and work.part.unknown is Unknown.ASK
    if state.unknown and asks and not state.again:
        return _Front(False, asking=(work.path,))
    return _Front(False, open=(work,))


def _loop(
    saga: Saga, part: ForEach, prefix: tuple[str, ...], inside: int, journal: Journal, state: StepState
) -> _Front:
    fronts: list[_Front] = []
    for number in range(length(state)):
        front = _series(saga, part.body, (*prefix, item_of(part.name, number)), inside, journal)
        if not front.done:
            fronts.append(front)
        if len(fronts) == part.at_once:
            break
    return _together(fronts)


def _together(fronts: Sequence[_Front]) -> _Front:
    """Side by side. Where one fails, what is open may still have to be found out about, and is not begun anew."""
    if all(front.done for front in fronts):
        return _DONE
    return _Front(
        False,
        tuple(work for front in fronts for work in front.open),
        tuple(path for front in fronts for path in front.failed),
        tuple(path for front in fronts for path in front.asking),
    )


def _back(saga: Saga, journal: Journal) -> Decision:
    """The next compensation, from the last step that was done to the first."""
    for work in _undoings(saga, saga.parts, (), 0, journal):
        if journal.of_step(work.path).undo_failed:
            return Decision(end=End.STUCK, reason=work.path)
        return Decision(begin=(work,))
    return Decision(end=End.COMPENSATED)


def _undoings(
    saga: Saga, parts: Sequence[Part], prefix: tuple[str, ...], inside: int, journal: Journal
) -> Iterator[Work]:
    for part in reversed(parts):
        match part:
            case SagaStep() | Ask():
                work = Work(saga, part, prefix, inside, undo=True)
                if _is_to_undo(part, journal.of_step(work.path)):
                    yield work
            case Parallel():
                for branch in reversed(part.branches):
                    yield from _undoings(saga, branch, prefix, inside, journal)
            case When() | ForEach() | SubSaga():
                state = journal.of_step(Work(saga, part, prefix, inside).path)
                if state.passed:
                    for within in reversed(list(_inner(saga, part, prefix, inside, state))):
                        yield from _undoings(*within, journal)
            case _:
                pass


def _is_to_undo(part: SagaStep | Ask, state: StepState) -> bool:
    if part.compensation is None or state.undone:
        return False
    if isinstance(part, Ask):  # a command that was sent and not answered is taken back
        return state.done or state.begun or state.unknown
    return state.done or (state.unknown and part.unknown is Unknown.COMPENSATE)


_Inner = tuple[Saga, Sequence[Part], tuple[str, ...], int]


def _inner(saga: Saga, part: Part, prefix: tuple[str, ...], inside: int, state: StepState) -> Iterator[_Inner]:
    """The series inside of a part that was decided, in order."""
    match part:
        case When():
            yield saga, _taken(part, state), prefix, inside
        case ForEach():
            for number in range(length(state)):
                yield saga, part.body, (*prefix, item_of(part.name, number)), inside
        case SubSaga():
            yield part.saga, part.saga.parts, (*prefix, part.name), len(prefix) + 1


def is_behind_pivot(saga: Saga, journal: Journal) -> bool:
    """Whether a pivot is done: from then on there is no way back."""
    return saga.has_pivot and any(
        isinstance(work.part, SagaStep) and work.part.pivot and journal.of_step(work.path).passed
        for work in _every(saga, saga.parts, (), 0, journal)
    )


def _every(saga: Saga, parts: Sequence[Part], prefix: tuple[str, ...], inside: int, journal: Journal) -> Iterator[Work]:
    """Every step that there is by now, whether it was reached or not."""
    for part in parts:
        if isinstance(part, Parallel):
            for branch in part.branches:
                yield from _every(saga, branch, prefix, inside, journal)
            continue
        work = Work(saga, part, prefix, inside)
        yield work
        state = journal.of_step(work.path)
        if state.passed:
            for within in _inner(saga, part, prefix, inside, state):
                yield from _every(*within, journal)


def _reached(
    saga: Saga, parts: Sequence[Part], prefix: tuple[str, ...], inside: int, journal: Journal
) -> Iterator[str]:
    """The paths of steps that may have begun: whatever stands before them is done."""
    for part in parts:
        if isinstance(part, Parallel):
            for branch in part.branches:
                yield from _reached(saga, branch, prefix, inside, journal)
        else:
            work = Work(saga, part, prefix, inside)
            yield work.path
            state = journal.of_step(work.path)
            if state.passed:
                for within in _inner(saga, part, prefix, inside, state):
                    yield from _reached(*within, journal)
        if not _front(saga, part, prefix, inside, journal).done:
            return


def _taken(part: When, state: StepState) -> tuple[Part, ...]:
    return part.then if state.result == b"true" else part.otherwise


def length(state: StepState) -> int:
    """How many items the list of a loop has; none when it was skipped."""
    return len(orjson.loads(state.result)) if state.result else 0


def item_of(loop: str, number: int) -> str:
    """The part of a path that names an item of a loop, from 0."""
    return f"{loop}[{number}]"


__all__ = [
    "NOTHING",
    "Decision",
    "End",
    "Work",
    "decide",
    "disagreements",
    "is_behind_pivot",
    "item_of",
    "length",
    "open_steps",
]
