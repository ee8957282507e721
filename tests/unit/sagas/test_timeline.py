"""A journal as people read it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from soma_common.sagas.journal import What
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.timeline import Sign, Timeline, help_of, stuck_at, where
from soma_common.sagas.views import LoggedEntry, SagaSummary

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def entry(what: str, step: str = "", second: float = 0.0, **more: Any) -> LoggedEntry:
    known: dict[str, Any] = dict.fromkeys(
        ("took", "due", "result", "error_type", "error", "stack", "who", "why")
    )  # fmt: skip
    at = NOW + timedelta(seconds=second)
    return LoggedEntry(**(known | {"number": 1, "at": at, "step": step, "what": What(what), "attempt": 1} | more))


def summary(status: str = "running", **more: Any) -> SagaSummary:
    known: dict[str, Any] = dict.fromkeys(
        ("saga_key", "reason", "error_type", "error", "asked", "wake_at", "ended_at", "last_step", "last_what")
    )
    known |= {
        "saga_id": UUID(int=1), "name": "s", "version": 3, "tenant_id": "t", "status": SagaStatus(status), "priority": 3,
        "has_worker": False, "is_known": True, "deadline": NOW, "created_at": NOW, "correlation_id": "c", "trace_id": "",
        "length": 0,
    }  # fmt: skip
    return SagaSummary(**(known | more))


def lines(*entries: LoggedEntry) -> list[tuple[str, str, str]]:
    return [(line.sign, line.step, line.detail) for line in Timeline(entries).lines]


def test_tries_are_folded_under_their_step() -> None:
    tries = [
        entry(
            "retrying", "pay", n, attempt=n, took=0.5, due=NOW + timedelta(seconds=n + 1), error_type="E", error=str(n)
        )
        for n in range(1, 6)
    ]
    (line,) = Timeline(tries[:2]).lines
    assert (line.sign, line.detail) == (Sign.RETRYING, "is tried again at 2026-01-01 00:00:03Z")
    (line,) = Timeline([*tries, entry("done", "pay", 7, attempt=6, result=5)]).lines
    assert (line.sign, line.attempt, line.detail) == (Sign.DONE, 6, "5")
    assert line.folded == ["try 1 after 500 ms: E: 1", "... 3 more", "try 5 after 500 ms: E: 5"]


def test_a_wait_took_from_its_beginning_to_its_end() -> None:
    waiting = entry("waiting", "night", 1, due=NOW + timedelta(seconds=4))
    assert lines(waiting) == [("waiting", "night", "until 2026-01-01 00:00:04Z")]
    (line,) = Timeline([waiting, entry("done", "night", 4.5)]).lines
    assert (line.sign, line.took) == (Sign.DONE, 3.5)
    assert lines(entry("waiting", "approved")) == [("waiting", "approved", "for a signal")]


def test_steps_side_by_side_have_lines_of_their_own() -> None:
    told = lines(
        entry("begun", "a"), entry("begun", "b"), entry("done", "a", result=1), entry("unknown", "b", error_type="x.T"),
        entry("failed", "b", error_type="x.T", error="late"), entry("turned", why="b"), entry("undone", "a"), entry("ended"),
    )  # fmt: skip
    assert told == [
        ("done", "a", "1"), ("failed", "b", "T: late"), ("turned", "", "turns around because of b"),
        ("undone", "a", "undone"), ("ended", "", "compensated"),
    ]  # fmt: skip


def test_what_follows_a_person_stands_below() -> None:
    told = lines(
        entry("failed", "pay", error_type="E"), entry("stuck", why="pay"), entry("retry", "pay", who="ann", why="again"),
        entry("failed", "pay", error_type="E"), entry("done", "pay", who="bob", why="seen", result={"a": 1}),
        entry("cancel", who="eve", why="no"),
    )  # fmt: skip
    assert told == [
        ("failed", "pay", "E"), ("stuck", "", "stuck at pay"), ("person", "pay", "ann asks for another try: again"),
        ("failed", "pay", "E"), ("person", "pay", 'bob says that it happened ({"a":1}): seen'),
        ("person", "", "eve cancels it: no"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("saga", "words"),
    [
        (summary("completed"), ""),
        (summary("compensated", reason="pay"), "because of pay"),
        (summary("stuck", reason="pay"), "at pay"),
        (summary("stuck"), "at no step"),
        (summary("pending"), "waits for a worker"),
        (summary("pending", is_known=False), "waits for a worker with version 3"),
        (summary(has_worker=True), "at work"),
        (summary(has_worker=True, last_step="a"), "at work, after a"),
        (summary(asked="cancel", has_worker=True), "to cancel, at work"),
        (summary(), "waits for a signal"),
        (summary(last_step="yes", last_what=What.WAITING), "waits at yes"),
        (
            summary(last_step="a", last_what=What.RETRYING, wake_at=NOW + timedelta(hours=3)),
            "tries a again, due in 3 h",
        ),
        (summary("compensating", last_step="a", last_what=What.UNDO_RETRYING, wake_at=NOW), "tries to undo a, due"),
    ],
)
def test_where_a_saga_is(saga: SagaSummary, words: str) -> None:
    assert where(saga, NOW) == words


def test_what_helps_depends_on_where_it_is_stuck() -> None:
    def verbs(saga: SagaSummary, *journal: LoggedEntry) -> list[str]:
        return [command.split()[2] for command, _ in help_of(saga, journal)]

    stuck = summary("stuck", reason="pay")
    at_pay, turned = entry("stuck", why="pay"), entry("turned", why="pay")
    at_none = entry("stuck", error_type="Poison", error="it kills its worker")
    assert verbs(stuck, at_pay) == ["retry", "skip", "resolve", "resolve", "compensate"]
    assert verbs(stuck, turned, at_pay) == ["retry", "skip", "resolve"]
    assert verbs(stuck, at_none) == ["retry", "compensate"]
    assert verbs(stuck, turned, at_none) == ["retry"]
    assert stuck_at(stuck, [at_pay, at_none]) is None
    assert stuck_at(summary(reason="pay"), [at_pay]) is None
