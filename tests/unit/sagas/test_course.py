"""A claimed saga as its worker knows it."""

from __future__ import annotations

from uuid import UUID

from soma_common.sagas.course import Course
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.models import ForEach, Saga, SagaStatus, SagaStep
from soma_common.sagas.store import Claimed, Seen
from soma_common.tracing.context import TraceContext


def _items(number: int) -> list[int]:
    return [1, 2, 3]


async def pay() -> None: ...


async def unpay() -> None: ...


SAGA = Saga("loop", int, ForEach(_items, SagaStep(pay, unpay, name="pay"), at_once=2, name="items"))


def _course(*entries: Entry) -> Course:
    claimed = Claimed(
        UUID(int=1), SAGA.type_id, "t", SagaStatus.RUNNING, len(entries), 1, 1, False, 0, None, 1e6, b"1", "c",
        TraceContext.new(),
    )  # fmt: skip
    return Course(SAGA, claimed, entries, lease_ends=1e6, now=lambda: 0.0)


def test_nothing_begins_while_it_is_being_written_that_the_saga_turns() -> None:
    """One item is done and the next one fails; the third would be begun meanwhile, and done after the turn."""
    course = _course(
        Entry(what=What.DONE, step="items", result=b"[1,2,3]"), Entry(what=What.DONE, step="items[0]/pay", result=b"null"),
    )  # fmt: skip
    course.at_work.add("items[1]/pay")
    assert [work.path for work in course.decide().begin] == ["items[1]/pay", "items[2]/pay"]
    draft = course.draft(Entry(what=What.FAILED, step="items[1]/pay", attempt=1))
    assert [entry.what for entry in draft.record.entries] == [What.FAILED, What.TURNED]
    assert course.decide().begin == ()
    course.written(draft, Seen(None, 0))
    course.at_work.clear()
    assert [(work.path, work.undo) for work in course.decide().begin] == [("items[0]/pay", True)]
