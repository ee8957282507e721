"""A saga's journal as lines that people read: one per step, its failed tries folded under it. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from soma_common.escaping import json_text, plain
from soma_common.moments import span, stamp, took
from soma_common.sagas.journal import What
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.views import LoggedEntry, SagaSummary

_LONG: Final = 160  # characters of a result or an error
_FOLDED: Final = 3  # failed tries that are shown; of more, the first and the last


class Sign(StrEnum):
    """What a line is of."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    RETRYING = "retrying"
    UNKNOWN = "unknown"
    WAITING = "waiting"
    UNDONE = "undone"
    TURNED = "turned"
    STUCK = "stuck"
    ENDED = "ended"
    PERSON = "person"


_SIGNS: Final = {
    What.BEGUN: Sign.WAITING, What.WAITING: Sign.WAITING, What.DONE: Sign.DONE, What.SKIPPED: Sign.SKIPPED,
    What.RETRYING: Sign.RETRYING, What.UNKNOWN: Sign.UNKNOWN, What.FAILED: Sign.FAILED, What.UNDONE: Sign.UNDONE,
    What.UNDO_SKIPPED: Sign.SKIPPED, What.UNDO_RETRYING: Sign.RETRYING, What.UNDO_FAILED: Sign.FAILED,
    What.TURNED: Sign.TURNED, What.STUCK: Sign.STUCK, What.ENDED: Sign.ENDED,
}  # fmt: skip
_UNDO: Final = (What.UNDONE, What.UNDO_SKIPPED, What.UNDO_RETRYING, What.UNDO_FAILED)
_ASKED: Final = {
    What.RETRY: "asks for another try", What.COMPENSATE: "lets it turn around", What.CANCEL: "cancels it",
    What.SKIPPED: "passes over it", What.UNDO_SKIPPED: "passes over its compensation",
    What.DONE: "says that it happened", What.UNDONE: "says that it is undone",
    What.FAILED: "says that it did not happen",
}  # fmt: skip


@dataclass(slots=True)
class Line:
    """A line of the timeline. ``tries``: the failed ones, folded under it."""

    sign: Sign
    at: datetime
    step: str = ""
    attempt: int = 0
    took: float | None = None
    detail: str = ""
    tries: list[str] = field(default_factory=list)

    @property
    def folded(self) -> list[str]:
        """The failed tries, the middle of many left out."""
        if len(self.tries) <= _FOLDED:
            return self.tries
        return [self.tries[0], f"... {len(self.tries) - 2} more", self.tries[-1]]


class Timeline:
    """Lines of a journal, in the order in which they began. Entries may be added as they come."""

    def __init__(self, entries: Iterable[LoggedEntry] = ()) -> None:
        self.lines: list[Line] = []
        self._open: dict[tuple[str, bool], Line] = {}
        self._turned = False
        for entry in entries:
            self.add(entry)

    def add(self, entry: LoggedEntry) -> Line:
        """The line that it is told in: a new one, or that of its step."""
        if entry.who is not None:
            for undo in (False, True):
                self._open.pop((entry.step, undo), None)
            return self._new(Line(Sign.PERSON, entry.at, entry.step, detail=_of_person(entry)))
        if not entry.step:
            self._turned = self._turned or entry.what is What.TURNED
            return self._new(Line(_SIGNS[entry.what], entry.at, detail=self._of_saga(entry)))
        return self._of_step(entry)

    def _new(self, line: Line) -> Line:
        self.lines.append(line)
        return line

    def _of_saga(self, entry: LoggedEntry) -> str:
        if entry.what is What.TURNED:
            return f"turns around because of {short(entry.why)}"
        if entry.what is What.ENDED:
            return "compensated" if self._turned else "completed"
        return f"stuck at {short(entry.why)}" if entry.why else f"stuck: {error_of(entry.error_type, entry.error)}"

    def _of_step(self, entry: LoggedEntry) -> Line:
        undo = entry.what in _UNDO
        line = self._open.get((entry.step, undo))
        if line is None:
            line = self._new(Line(Sign.WAITING, entry.at, entry.step))
            self._open[entry.step, undo] = line
        waited = (entry.at - line.at).total_seconds() if line.sign is Sign.WAITING and line.at != entry.at else None
        line.sign, line.at, line.attempt = _SIGNS[entry.what], entry.at, entry.attempt
        line.took = waited if entry.took is None else entry.took
        line.detail = _detail(entry, undo=undo)
        if entry.due is not None and entry.what is not What.WAITING:
            line.tries.append(_try(entry))
            line.detail = f"{_again(entry)} at {stamp(entry.due)}"
        if line.sign in (Sign.DONE, Sign.SKIPPED, Sign.FAILED, Sign.UNDONE):
            del self._open[entry.step, undo]
        return line


def where(saga: SagaSummary, now: datetime) -> str:
    """Where a saga is, in a few words."""
    if saga.status is SagaStatus.COMPLETED:
        return ""
    if saga.status is SagaStatus.COMPENSATED:
        return f"because of {saga.reason}" if saga.reason else ""
    if saga.status is SagaStatus.STUCK:
        return f"at {saga.reason}" if saga.reason else "at no step"
    asked = f"to {saga.asked}, " if saga.asked and saga.status is not SagaStatus.COMPENSATING else ""
    if not saga.is_known:
        return f"{asked}waits for a worker with version {saga.version}"
    return asked + _active(saga, now)


def _active(saga: SagaSummary, now: datetime) -> str:
    if saga.has_worker:
        return f"at work, after {saga.last_step}" if saga.last_step else "at work"
    if saga.status is SagaStatus.PENDING:
        return "waits for a worker"
    doing = _doing(saga)
    if saga.wake_at is None:
        return f"{doing} for a signal" if doing == "waits" else doing
    return f"{doing}, due" + (f" in {span(saga.wake_at - now)}" if saga.wake_at > now else "")


def _doing(saga: SagaSummary) -> str:
    if saga.last_what is What.WAITING:
        return f"waits at {saga.last_step}"
    if saga.last_what in (What.RETRYING, What.UNKNOWN):
        return f"tries {saga.last_step} again"
    return f"tries to undo {saga.last_step}" if saga.last_what is What.UNDO_RETRYING else "waits"


def stuck_at(saga: SagaSummary, journal: Iterable[LoggedEntry]) -> str | None:
    """The step at which a saga is stuck; None: it is not, or at none (its code changed, or kills its worker)."""
    found = None
    for entry in journal if saga.status is SagaStatus.STUCK else ():
        found = entry.why or None if entry.what is What.STUCK else found
    return found


def help_of(saga: SagaSummary, journal: Iterable[LoggedEntry]) -> list[tuple[str, str]]:
    """Commands that can help a stuck saga, and what each does."""
    entries = list(journal)
    step, turned = stuck_at(saga, entries), any(entry.what is What.TURNED for entry in entries)
    one = f"the compensation of {step}" if turned else step
    found = [("retry", "", f"try {one} again" if step else "try again")]
    if step:
        found.append(("skip", "", f"pass over {one}"))
        found.append(("resolve", " --happened", f"{step} is undone" if turned else f"{step} took effect"))
    if not turned:
        if step:
            found.append(("resolve", " --did-not-happen", f"{step} did not take effect"))
        found.append(("compensate", "", "undo what was done; not behind a pivot"))
    return [(f"somastack saga {verb} {saga.saga_id}{more} --why '...'", does) for verb, more, does in found]


def error_of(kind: str | None, message: str | None) -> str:
    """An error in one short line."""
    told = (short((kind or "").rpartition(".")[2]), short(message))
    return ": ".join(each for each in told if each)


def short(value: str | None, most: int = _LONG) -> str:
    """Text in one line, with what would steer a terminal as escapes, and its end left out where it is long."""
    text = (value or "").strip()
    return plain(text) if len(text) <= most else plain(text[:most]) + " ..."


def value_of(value: Any, most: int = _LONG) -> str:
    """A value as short JSON."""
    return "" if value is None else short(json_text(value), most)


def _of_person(entry: LoggedEntry) -> str:
    result = f" ({value_of(entry.result)})" if entry.what is What.DONE and entry.result is not None else ""
    return f"{short(entry.who)} {_ASKED.get(entry.what, entry.what)}{result}: {short(entry.why)}"


def _detail(entry: LoggedEntry, *, undo: bool) -> str:
    match entry.what:
        case What.BEGUN:
            return "begun"
        case What.WAITING:
            return f"until {stamp(entry.due)}" if entry.due else "for a signal"
        case What.DONE:
            return value_of(entry.result)
        case What.UNKNOWN:
            return f"{error_of(entry.error_type, entry.error)} - nobody knows whether it took effect"
        case What.SKIPPED | What.UNDO_SKIPPED | What.UNDONE:
            return "undone" if entry.what is What.UNDONE else "passed over"
        case _:
            return ("cannot be undone: " if undo else "") + error_of(entry.error_type, entry.error)


def _again(entry: LoggedEntry) -> str:
    return "is to be undone again" if entry.what is What.UNDO_RETRYING else "is tried again"


def _try(entry: LoggedEntry) -> str:
    lasted = "" if entry.took is None else f" after {took(entry.took)}"
    doubt = " - nobody knows whether it took effect" if entry.what is What.UNKNOWN else ""
    return f"try {entry.attempt}{lasted}: {error_of(entry.error_type, entry.error)}{doubt}"
