"""What is known of a torture run of sagas: every saga with all that it left behind, and what was done to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from tests.torture.saga_plans import Place, Plan, places

ENDS = ("completed", "compensated", "stuck")


class Line(NamedTuple):
    """An entry of a saga's journal. ``who`` and ``why`` are of people."""

    number: int
    step: str
    what: str
    attempt: int
    epoch: int
    error: str = ""
    who: str | None = None
    why: str | None = None
    result: int | None = None


class Moved(NamedTuple):
    """What one act of a step did to the ledger: which account lost, which gained, and how many rows it wrote."""

    step: str
    undo: bool
    debit: int
    credit: int
    cents: int
    rows: int = 2


class Called(NamedTuple):
    """What the bank outside knows of one key."""

    charged: int
    refunded: int
    charges: int
    refunds: int
    clash: bool


class Sent(NamedTuple):
    """A signal. ``taken``: the entry that took it; 0: refused."""

    signal_id: str
    payload: int
    taken: int | None


@dataclass(frozen=True)
class Story:
    """One saga: where it stands, its journal, its effects in their order, and what others know of it."""

    saga_id: str
    key: str
    name: str
    status: str
    length: int
    plan: Plan | None
    given: object = None
    lines: Sequence[Line] = ()
    moved: Sequence[Moved] = ()
    events: Mapping[str, int] = field(default_factory=Counter)
    calls: Mapping[str, Called] = field(default_factory=dict)
    signals: Sequence[Sent] = ()
    open_letters: int = 0
    letters: int = 0

    @cached_property
    def places(self) -> Sequence[Place]:
        """Its parts, by its plan."""
        return list(places(self.plan.name, self.plan.job)) if self.plan else []

    def steps(self, *whats: str, by_worker: bool = False) -> list[str]:
        """Paths of entries of some kinds, in order; of those that nobody made by hand."""
        return [line.step for line in self.lines if line.what in whats and not (by_worker and line.who)]

    def fate(self, path: str) -> str:
        """How a step is to fail."""
        return self.plan.job.fates.get(path, "").partition(":")[0] if self.plan else ""


class Ack(NamedTuple):
    """A saga was started, as its starter was told; ``at`` by the run's clock."""

    number: int
    saga_id: str
    at: float


class Act(NamedTuple):
    """What somebody wanted of a saga. ``answer``: ``ok``, ``asked`` before, ``no``, or empty: it was never learnt."""

    verb: str
    saga_id: str
    why: str
    answer: str
    at: float


class Told(NamedTuple):
    """A signal that was acknowledged."""

    saga_id: str
    coin: int
    at: float


@dataclass(frozen=True, slots=True)
class Known:
    """What the processes of the run know. ``wrong``: keys that were taken for another input."""

    tried: Collection[int] = frozenset()
    rolled_back: Collection[int] = frozenset()
    acks: Sequence[Ack] = ()
    acts: Sequence[Act] = ()
    signals: Sequence[Told] = ()
    wrong: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """An account, and what its entries come to. Cents."""

    account: int
    opening: int
    balance: int
    entries: int


@dataclass(frozen=True)
class History:
    """Everything. ``interruptions``: how often the calls that a worker had under way may have been cut off, and
    ``at_once`` how many those were at most. ``waited``: seconds until a saga went on after its worker was killed.
    ``moment``: what was acknowledged after it may have been lost by a promotion."""

    known: Known
    stories: Sequence[Story]
    accounts: Sequence[Account] = ()
    interruptions: int = 0
    at_once: int = 50
    waited: Sequence[float] = ()
    moment: float = float("inf")
    failures: Sequence[str] = ()


def repeats(story: Story) -> int:
    """Calls of the bank beyond the attempts of which the journal tells."""
    extra = 0
    for path, called in story.calls.items():
        mine = [line for line in story.lines if line.step == path and not line.who]
        attempts = {line.attempt for line in mine if line.what in ("done", "retrying", "unknown", "failed")}
        undos = sum(1 for line in mine if line.what in ("undone", "undo-retrying", "undo-failed"))
        extra += max(0, called.charges - len(attempts)) + max(0, called.refunds - undos)
    return extra
