"""Fingerprints, bounded texts, sequences and policies."""

from __future__ import annotations

from uuid import uuid4

import pytest

from soma_common.dlq.failures import MOST_STACK, Failure, Stage, steady, storable, tail
from soma_common.dlq.models import RawRecord, RedrivePolicy, sequence_of
from soma_common.errors import ValidationError

HANDLER = "def handle(number):\n{pad}    raise {error}(f'order {{number}} of {{number * 7}} is odd')\n"


def failed(number: int, *, pad: int = 0, error: str = "ValueError", file: str = "/srv/app/handlers.py") -> Exception:
    """An error raised by a handler of another file, so many lines further down."""
    space: dict[str, object] = {}
    exec(compile(HANDLER.format(pad="\n" * pad, error=error), file, "exec"), space)
    try:
        space["handle"](number)  # type: ignore[operator]
    except Exception as raised:
        return raised
    raise AssertionError


def mark(error: BaseException, stage: Stage = Stage.HANDLE, event_type: str = "order.paid") -> str:
    return Failure.of(stage, error, event_type=event_type).fingerprint


def test_a_fingerprint_is_the_same_for_failures_of_one_kind() -> None:
    one = mark(failed(1))
    assert mark(failed(2)) == one  # other numbers in the message
    assert mark(failed(1, pad=40)) == one  # other lines
    assert mark(failed(1, file="/home/me/checkout/handlers.py")) == one  # another folder
    assert len(one) == 16


def test_a_fingerprint_differs_for_other_kinds() -> None:
    others = [
        mark(failed(1, error="KeyError")), mark(failed(1, file="/srv/app/other.py")), mark(failed(1), Stage.UNDO),
        mark(failed(1), event_type="order.sent"),
    ]  # fmt: skip
    assert len({mark(failed(1)), *others}) == 5


def test_an_error_that_was_never_raised_is_told_by_its_message() -> None:
    one = mark(ValueError(f"event {uuid4()} at 17 holds 'x'\nand more"))
    assert mark(ValueError(f"event {uuid4()} at 99 holds 'yy'")) == one
    assert mark(ValueError("something else")) != one


def test_what_differs_from_event_to_event_is_left_out() -> None:
    told = f"id {uuid4()} ptr 0x7f00 hash {'a1' * 16} n 12.5 name 'bob' and \"eve\""
    assert steady(told) == "id * ptr * hash * n *.* name * and *"
    assert steady("") == ""


def test_an_endless_recursion_has_a_bounded_stack() -> None:
    def again(n: int) -> int:
        return again(n + 1) + 1

    try:
        again(0)
    except RecursionError as error:
        failure = Failure.of(Stage.HANDLE, error)
        assert len(failure.stack.encode()) <= MOST_STACK
        assert "again" in failure.stack


def test_a_stack_keeps_its_end() -> None:
    text = tail("é" * 10_000 + "the end")
    assert len(text.encode()) <= MOST_STACK
    assert text.startswith("[...]")
    assert text.endswith("the end")
    assert tail("short") == "short"


@pytest.mark.parametrize("text", ["é" * 10, "\0" * 10, "\ud800" * 10, "a€" * 10, "😀" * 10, ""])
def test_storable_texts_are_utf8_within_the_limit(text: str) -> None:
    for most in range(12):
        found = storable(text, most)
        assert len(found.encode()) <= most
        assert "\0" not in found


def test_the_class_of_an_error_has_its_module() -> None:
    assert Failure.of(Stage.HANDLE, ValueError()).error_type == "ValueError"
    assert Failure.of(Stage.HANDLE, ValidationError()).error_type == "soma_common.errors.ValidationError"


def test_sequences_are_never_taken_for_one_another() -> None:
    records = [
        RawRecord(topic="t", partition=1, offset=0, key=key)
        for key in (None, b"", b"t[1]", b"pt[1]", b"x" * 511, b"x" * 512, b"x" * 10**6)
    ]
    sequences = [sequence_of(record) for record in records]
    assert len(set(sequences)) == len(records)
    assert max(map(len, sequences)) <= 512
    assert sequence_of(records[2], by_partition=True) == sequences[0]
    assert sequence_of(RawRecord(topic="other", partition=9, offset=5, key=b"t[1]")) == sequences[2]


def test_a_policy_says_when_and_how_often() -> None:
    policy = RedrivePolicy(after=60, tries=3, factor=2, most=200)
    assert [policy.delay(left) for left in (3, 2, 1, 0)] == [60, 120, 200, None]
    assert RedrivePolicy(tries=0).delay(0) is None
    for wrong in ({"after": 0}, {"after": -1}, {"tries": -1}, {"factor": 0.5}, {"most": 1}, {"after": float("nan")}):
        with pytest.raises(ValidationError):
            RedrivePolicy(**wrong)
