"""A claimed saga as its worker knows it: its journal, what is not written yet, what is due when."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.sagas.context import SagaContext
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Decision, End, Work, decide, is_behind_pivot, open_steps
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.steps import SagaStep, Unknown
from soma_common.sagas.store import Claimed, Record, Seen
from soma_common.sagas.tally import SagaTally
from soma_common.sagas.values import Values

_STATUS: Final = {
    End.COMPLETED: SagaStatus.COMPLETED, End.COMPENSATED: SagaStatus.COMPENSATED, End.STUCK: SagaStatus.STUCK,
}  # fmt: skip
_FAILURES: Final = (What.FAILED, What.UNKNOWN, What.UNDO_FAILED)


@dataclass(frozen=True, slots=True)
class Draft:
    """A record, and those of its entries that the journal does not have yet.

    ``unwritten``: how many it has already. ``base`` and ``journal``: the journal without the fresh ones, and with them.
    """

    record: Record
    fresh: Sequence[Entry]
    unwritten: int
    base: Journal
    journal: Journal


class Course:
    """Where a claimed saga stands.

    ``at_work``: steps that are under way. ``doubtful``: steps that a former worker may have been at when it died.
    ``due``: when a step may be tried again, or a wait ends, by the monotonic clock ``now``. ``over``: it ended, or was
    given back.
    """

    def __init__(
        self, saga: Saga, claimed: Claimed, entries: Sequence[Entry], *, lease_ends: float,
        now: Callable[[], float], tally: SagaTally | None = None,
    ) -> None:  # fmt: skip
        self.saga, self.claimed, self.lease_ends, self.now = saga, claimed, lease_ends, now
        self.journal, self.values = Journal.of(entries), Values(saga, claimed.input)
        self.deadline = now() + claimed.left
        self.due = {path: now() + state.due for path, state in self.journal.steps.items() if state.due is not None}
        self.at_work: set[str] = set()
        self._tally = tally
        self.doubtful: set[str] = set()
        self.over = False
        self._closing = False  # a record with which it turns or ends is being written
        self._unwritten: list[Entry] = []
        self._decided: tuple[Journal, tuple[bool, bool, int], Decision] | None = None
        self._errors = {entry.step: entry for entry in entries if entry.what in _FAILURES}
        if claimed.doubtful:
            self.doubtful |= {work.path for work in open_steps(saga, self.journal) if _may_be_twice(work)}

    @property
    def one_way(self) -> bool:
        """Whether it is behind its pivot."""
        return is_behind_pivot(self.saga, self.journal)

    @property
    def unwritten(self) -> bool:
        """Whether there are entries that no record has taken yet."""
        return bool(self._unwritten)

    @property
    def _written(self) -> int:
        """How many entries the database has, as far as is known here."""
        return self.journal.length - len(self._unwritten)

    def decide(self) -> Decision:
        """What to do now: nothing new while it is being written that it turns or ends."""
        return Decision() if self._closing else self._decide(self.journal, alone=not self.at_work)

    def _decide(self, journal: Journal, *, alone: bool) -> Decision:
        """What follows from a journal. What a draft asked is asked again when it is written: it is kept."""
        wanted = self.claimed.asked is not None or self.now() >= self.deadline
        circumstances = (wanted, alone, len(self.doubtful))  # of the doubtful some may leave, none comes
        if self._decided is not None and self._decided[0] is journal and self._decided[1] == circumstances:
            return self._decided[2]
        decision = decide(self.saga, journal, turn_wanted=wanted, doubtful=self.doubtful, at_work=not alone)
        self._decided = (journal, circumstances, decision)
        return decision

    def note(self, entry: Entry) -> None:
        """An entry that is written with the next record: what it says can be found out again."""
        self._unwritten.append(entry)
        self._add([entry], self.journal.after(entry))

    def draft(self, *entries: Entry) -> Draft:
        """A record of entries, with what follows from them: a saga that turns, ends or is stuck does so in the same
        commit as what led to it."""
        unwritten, fresh, base = tuple(self._unwritten), list(entries), self.journal
        journal = base.after(*entries) if entries else base
        alone = self.at_work <= {entry.step for entry in entries}
        record = Record(saga=self.claimed, known=self._written)
        while record.kept:
            decision = self._decide(journal, alone=alone)
            if not decision.turn and decision.end is None:
                break
            follows, record = self._following(decision, record, journal, entries)
            fresh.append(follows)
            journal = journal.after(follows)
        self._closing = len(fresh) > len(entries)
        return Draft(replace(record, entries=(*unwritten, *fresh)), fresh, len(unwritten), base, journal)

    def _following(
        self, decision: Decision, record: Record, journal: Journal, entries: Sequence[Entry]
    ) -> tuple[Entry, Record]:
        if decision.turn:
            reason = decision.reason or self.claimed.asked or "deadline"
            turned = replace(record, status=SagaStatus.COMPENSATING, **self._why(reason, entries))
            return Entry(what=What.TURNED, why=reason), turned
        assert decision.end is not None
        ended = replace(record, status=_STATUS[decision.end], kept=False)
        if decision.end is End.STUCK:
            ended = replace(ended, **self._why(decision.reason, entries))
            return Entry(what=What.STUCK, why=decision.reason), ended
        if decision.end is End.COMPLETED:
            ended = replace(ended, result=self.values.result(journal))
        return Entry(what=What.ENDED, why=decision.reason), ended

    def _why(self, reason: str | None, entries: Sequence[Entry]) -> dict[str, Any]:
        """The step because of which it turned or is stuck, and its error."""
        errors = self._errors | {entry.step: entry for entry in entries if entry.what in _FAILURES}
        told = errors.get(reason or "")
        return {
            "turns": True,
            "reason": reason,
            "error_type": told.error_type if told else None,
            "error": told.error if told else _NO_ERROR.get(reason or ""),
        }

    def written(self, draft: Draft, seen: Seen) -> None:
        """A draft was written."""
        self._closing = False
        del self._unwritten[: draft.unwritten]
        same = self.journal is draft.base  # else something else was written meanwhile
        self._add(draft.fresh, draft.journal if same else self.journal.after(*draft.fresh))
        self.over = not draft.record.kept
        if self._tally is not None:
            self._tally.written(self.saga.name, draft.record.entries)
        if (seen.asked, seen.signals) != (self.claimed.asked, self.claimed.signals):
            self.claimed = replace(self.claimed, asked=seen.asked, signals=seen.signals)

    def _add(self, entries: Sequence[Entry], journal: Journal) -> None:
        self.journal = journal
        now = self.now()
        for entry in entries:
            if entry.what is What.TURNED:
                self.due.clear()
            self.due.pop(entry.step, None)
            if entry.due_in is not None:
                self.due[entry.step] = now + entry.due_in
            if entry.what in _FAILURES:
                self._errors[entry.step] = entry
            self.doubtful.discard(entry.step)

    def giving_back(self, wake_in: float) -> Draft:
        """A record with which it is given back: nothing can be done for so many seconds, or until something comes."""
        if not self.journal.turned and not self.one_way:
            wake_in = min(wake_in, max(0.0, self.deadline - self.now()))
        waits = None if wake_in == math.inf else wake_in
        record = Record(
            saga=self.claimed, known=self._written, entries=tuple(self._unwritten), kept=False, wake_in=waits
        )
        return Draft(record, (), len(self._unwritten), self.journal, self.journal)

    def stuck(self, error_type: str, error: str) -> Draft:
        """A record with which it is stuck for a reason that is no step's."""
        record = Record(
            saga=self.claimed, known=self._written, status=SagaStatus.STUCK, kept=False, turns=True,
            entries=(Entry(what=What.STUCK, error_type=error_type, error=error),), error_type=error_type, error=error,
        )  # fmt: skip
        return Draft(record, record.entries, 0, self.journal, self.journal.after(*record.entries))

    def number(self, work: Work) -> int:
        """The number of the next attempt at a step, or at its compensation."""
        state = self.journal.of_step(work.path)
        return (state.undo_attempts if work.undo else state.attempts) + 1

    def context(self, work: Work) -> SagaContext:
        """What the function of a step is told."""
        claimed = self.claimed
        return SagaContext(
            saga_id=claimed.saga_id, saga=self.saga.name, version=self.saga.version, step=work.path,
            attempt=self.number(work), tenant_id=claimed.tenant_id, correlation_id=claimed.correlation_id,
            undoing=work.undo, trace=claimed.trace,
        )  # fmt: skip


_NO_ERROR: Final = {
    "deadline": "its deadline passed", "compensate": "somebody asked for it", "cancel": "somebody cancelled it",
}  # fmt: skip


def _may_be_twice(work: Work) -> bool:
    """Whether it is an external step that is tried again when nobody knows: of others the journal says more."""
    if not isinstance(work.part, SagaStep) or work.part.unknown is not Unknown.RETRY:
        return False
    return not work.saga.calls[work.part.name].transactional
