"""What a person may ask, and what follows."""

from __future__ import annotations

import pytest

from soma_common.errors import EventTooLarge, WrongSagaState
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.temporal.messages import MOST_MESSAGE, Verb, check_size, entry_of, plain
from soma_common.temporal.verbs import RESOLVE, RETRY, SKIP, at_stuck, check_compensate, decided
from tests.temporal_sagas import place_order

ANN = Verb(who="ann", why="so")
FAILED = Journal().after(Entry(what=What.FAILED, step="pay", attempt=2))
UNDOING = Journal().after(
    Entry(what=What.DONE, step="reserve", attempt=1), Entry(what=What.TURNED), Entry(what=What.UNDO_FAILED, step="reserve", attempt=4)
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "journal", "stuck", "verb", "what"),
    [
        (RETRY, FAILED, "pay", ANN, What.RETRY),
        (RETRY, UNDOING, "reserve", ANN, What.RETRY),
        (SKIP, UNDOING, "reserve", ANN, What.UNDO_SKIPPED),
        (RESOLVE, FAILED, "pay", Verb(who="a", why="b", happened=True), What.DONE),
        (RESOLVE, FAILED, "pay", Verb(who="a", why="b", happened=False), What.FAILED),
        (RESOLVE, UNDOING, "reserve", Verb(who="a", why="b", happened=True), What.UNDONE),
    ],
)
def test_what_follows(kind: str, journal: Journal, stuck: str, verb: Verb, what: What) -> None:
    path = at_stuck(kind, verb, place_order, journal, stuck)
    entry = decided(kind, verb, path, journal, '"r"')
    assert (entry.what, entry.step, entry.who, entry.why) == (what, stuck, verb.who, verb.why)
    assert entry.result == (b'"r"' if what is What.DONE else None)


@pytest.mark.parametrize(
    ("kind", "journal", "stuck", "verb", "told"),
    [
        (RETRY, FAILED, None, ANN, "not stuck"),
        (RETRY, FAILED, "pay", Verb(who="ann", why="so", step="ship"), "not stuck at ship"),
        (RETRY, FAILED, "pay", Verb(who="", why="so"), "who decides"),
        (SKIP, FAILED, "pay", ANN, "without the result of pay"),
        (RESOLVE, FAILED, "pay", ANN, "not said whether"),
        (RESOLVE, UNDOING, "reserve", Verb(who="a", why="b", happened=False), "is not undone"),
    ],
)
def test_what_does_not_fit(kind: str, journal: Journal, stuck: str | None, verb: Verb, told: str) -> None:
    with pytest.raises(WrongSagaState, match=told):
        at_stuck(kind, verb, place_order, journal, stuck)


def test_turning_around() -> None:
    check_compensate(ANN, Journal(), None, behind_pivot=False)
    for journal, stuck, behind in ((UNDOING, None, False), (Journal(), None, True), (Journal(), "pay", False)):
        with pytest.raises(WrongSagaState):
            check_compensate(ANN, journal, stuck, behind_pivot=behind)


@pytest.mark.parametrize(
    "entry",
    [
        Entry(what=What.DONE, step="a/b[1]", attempt=3, result=b'"\\u00e4"', took=0.5),
        Entry(what=What.UNKNOWN, step="a", attempt=1, error_type="E", error="e", stack="s", due_in=1.5),
        Entry(what=What.TURNED, why="deadline"),
    ],
)
def test_an_entry_is_carried_into_a_new_run(entry: Entry) -> None:
    assert entry_of(plain(entry)) == entry


def test_a_message_has_a_size() -> None:
    check_size("it", "x" * (MOST_MESSAGE - 10), None)
    with pytest.raises(EventTooLarge, match="it is too large"):
        check_size("it", "ä" * (MOST_MESSAGE // 5))
