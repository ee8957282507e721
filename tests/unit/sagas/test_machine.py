"""The machine, through its whole state space: every definition of up to five steps, failing at every place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import pytest

from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Decision, End, decide
from soma_common.sagas.models import Saga
from soma_common.sagas.steps import SagaStep, Unknown

Outcome = Literal["done", "failed", "unknown"]


async def act() -> None: ...


async def undo() -> None: ...


@dataclass(frozen=True)
class Kind:
    """What a step is like."""

    undoable: bool
    pivot: bool = False
    unknown: Unknown = Unknown.RETRY

    def step(self, name: str) -> SagaStep:
        compensation = undo if self.undoable else None
        return SagaStep(act, compensation, name=name, pivot=self.pivot, unknown=self.unknown)


KINDS = (
    Kind(False),
    Kind(True),
    Kind(True, unknown=Unknown.COMPENSATE),
    Kind(True, unknown=Unknown.ASK),
    Kind(False, pivot=True),
)


@dataclass(frozen=True)
class Case:
    """Steps 1..N-1 are done, and N ends so."""

    kinds: tuple[Kind, ...]
    failing: int  # from 0; the number of steps: none fails
    outcome: Outcome

    def saga(self) -> Saga:
        return Saga("case", int, *(kind.step(f"s{number}") for number, kind in enumerate(self.kinds)))


def cases(most: int) -> Iterator[Case]:
    for size in range(1, most + 1):
        for kinds in product(KINDS, repeat=size):
            yield Case(kinds, size, "done")
            for failing in range(size):
                yield Case(kinds, failing, "failed")
                yield Case(kinds, failing, "unknown")


def expected(case: Case) -> tuple[End, list[str]]:
    """How it ends and what is undone, in order, straight from REQUIREMENTS 23.2 and DESIGN 9."""
    n = case.failing
    if n == len(case.kinds):
        return End.COMPLETED, []
    at_n = case.kinds[n]
    if case.outcome == "unknown" and at_n.unknown is Unknown.ASK:
        return End.STUCK, []
    if any(kind.pivot for kind in case.kinds[:n]):
        return End.STUCK, []
    undone = [f"s{number}" for number in range(n - 1, -1, -1) if case.kinds[number].undoable]
    if case.outcome == "unknown" and at_n.unknown is Unknown.COMPENSATE:
        undone.insert(0, f"s{n}")
    return End.COMPENSATED, undone


def run(case: Case) -> tuple[End, list[str]]:
    """Let the machine lead, with the outcomes of the case."""
    saga, journal, undone = case.saga(), Journal(), list[str]()
    for _ in range(4 * len(case.kinds) + 4):
        decision = decide(saga, journal)
        if decision.end is not None:
            return decision.end, undone
        if decision.turn:
            journal = journal.after(Entry(what=What.TURNED))
            continue
        (work,) = decision.begin
        if work.undo:
            undone.append(work.path)
            journal = journal.after(Entry(what=What.UNDONE, step=work.path))
            continue
        number = int(work.path[1:])
        failing = number == case.failing
        if failing and case.outcome == "unknown":
            journal = journal.after(Entry(what=What.UNKNOWN, step=work.path, attempt=1))
            if case.kinds[number].unknown is not Unknown.ASK:
                journal = journal.after(Entry(what=What.FAILED, step=work.path, attempt=1))
        else:
            what = What.FAILED if failing else What.DONE
            journal = journal.after(Entry(what=what, step=work.path, attempt=1, result=b"null"))
    raise AssertionError(f"{case} does not end")


def test_every_definition_up_to_five_steps_failing_at_every_place() -> None:
    counted = 0
    for case in cases(5):
        assert run(case) == expected(case), case
        counted += 1
    assert counted == sum(len(KINDS) ** size * (1 + 2 * size) for size in range(1, 6))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_what_is_decided_depends_on_the_journal_alone(size: int) -> None:
    """Each state is reached again from its entries alone, as a worker does that takes the saga over."""
    saga = Saga("again", int, *(SagaStep(act, undo, name=f"s{n}") for n in range(size)))
    entries: Sequence[Entry] = [Entry(what=What.DONE, step=f"s{n}", attempt=1, result=b"null") for n in range(size)]
    journal = Journal()
    for count in range(size):
        assert decide(saga, journal) == decide(saga, Journal.of(entries[:count]))
        journal = journal.after(entries[count])
    assert decide(saga, journal) == Decision(end=End.COMPLETED)


def test_what_a_person_wants_tried_again_is_found_out_before_the_saga_turns() -> None:
    """The last attempt of the step may have taken effect: to turn now would leave it there."""
    saga = Saga("asks", int, SagaStep(act, undo, name="pay", unknown=Unknown.ASK))
    journal = Journal.of([Entry(what=What.BEGUN, step="pay"), Entry(what=What.UNKNOWN, step="pay", attempt=1)])
    assert decide(saga, journal).end is End.STUCK
    journal = journal.after(Entry(what=What.RETRY, step="pay"))
    (work,) = decide(saga, journal, turn_wanted=True).begin
    assert (work.path, work.undo) == ("pay", False)
    done = journal.after(Entry(what=What.DONE, step="pay", attempt=2, result=b"null"))
    assert decide(saga, done, turn_wanted=True).turn
    (work,) = decide(saga, done.after(Entry(what=What.TURNED))).begin
    assert work.undo
    unknown = journal.after(Entry(what=What.UNKNOWN, step="pay", attempt=2))
    assert decide(saga, unknown, turn_wanted=True).end is End.STUCK
