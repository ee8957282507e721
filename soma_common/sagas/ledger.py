"""The journal of a choreography in one service's database, within the transaction of its consumer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import fetch
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.models import SagaStatus
from soma_common.sql.loader import blocks

_SQL: Final = blocks("choreography")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a choreography turned: a step, or an event; and its error."""

    reason: str
    error_type: str | None = None
    error: str | None = None


class Ledger:
    """The journal of one choreography. Its row is locked until the transaction ends: within a service, what happens to
    it happens one after the other."""

    def __init__(self, tx: Any, saga_id: UUID, entries: Sequence[Entry]) -> None:
        self._tx, self.saga_id = tx, saga_id
        self.journal = Journal.of(entries)
        self._ended = _ends(entries)

    @classmethod
    async def open(cls, tx: Any, choreography: Choreography, event: RecordedEvent) -> Ledger:
        """The journal of what an event belongs to; a new one where there is none."""
        saga_id = choreography.saga_id(event.tenant_id, event.correlation_id)
        trace = event.trace
        arguments = (
            saga_id, choreography.type_id, choreography.name, event.tenant_id, event.correlation_id, trace.traceparent,
            trace.tracestate,
        )  # fmt: skip
        await fetch(tx, _SQL["open"], arguments)
        rows = await fetch(tx, _SQL["entries"], (saga_id,))
        return cls(tx, saga_id, [Entry(what=What(row[1]), step=row[0]) for row in rows])

    @property
    def turned(self) -> bool:
        """Whether it failed: no step runs any more."""
        return self.journal.turned

    @property
    def ended(self) -> bool:
        """Whether it is completed, as far as it did not fail."""
        return self._ended

    def knows(self, step: str) -> bool:
        """Whether a step ran, was refused, or was skipped."""
        state = self.journal.of_step(step)
        return state.passed or state.failed

    @property
    def status(self) -> SagaStatus:
        """Where it stands, by what is known here. It depends on what came, not on the order: a failure is stronger
        than an end, and what is undone stays undone."""
        if self.turned:
            left = any(state.done and not state.undone for state in self.journal.steps.values())
            return SagaStatus.COMPENSATING if left else SagaStatus.COMPENSATED
        return SagaStatus.COMPLETED if self._ended else SagaStatus.RUNNING

    def left_of(self, service: str) -> list[str]:
        """The steps of a service that are done and not undone, the newest first."""
        steps = self.journal.steps.items()
        mine = [step for step, state in steps if state.done and not state.undone and step.rpartition("/")[0] == service]
        return mine[::-1]

    async def result(self, step: str, what: What) -> bytes | None:
        """With what a step began (the event), or what it gave, as JSON."""
        rows = await fetch(self._tx, _SQL["results"], (self.saga_id, step, what))
        return rows[0][0].encode() if rows and rows[0][0] is not None else None

    async def write(self, *entries: Entry, cause: Cause | None = None) -> None:
        """Add entries; what is known and the status follow."""
        self.journal = self.journal.after(*entries)
        self._ended = self._ended or _ends(entries)
        why = (cause.reason, cause.error_type, cause.error) if cause else (None, None, None)
        await fetch(self._tx, _SQL["write"], (self.saga_id, self.status, *why, *_columns(entries)))


def _ends(entries: Sequence[Entry]) -> bool:
    return any(entry.what is What.ENDED for entry in entries)


def _columns(entries: Sequence[Entry]) -> list[list[Any]]:
    rows = [
        (
            each.step, each.what, each.attempt, each.took, None if each.result is None else each.result.decode(),
            each.error_type, each.error, each.stack, each.who, each.why,
        )
        for each in entries
    ]  # fmt: skip
    return [list(column) for column in zip(*rows, strict=True)]
