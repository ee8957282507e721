"""Pages of events have a bounded size, and the size that was asked for while events are small."""

from __future__ import annotations

from typing import Any

from soma_common.events.paging import PAGE_BYTES, PageBound
from soma_common.events.payloads import MAX_METADATA_BYTES, MAX_PAYLOAD_BYTES

KIB = 1024


def rows(count: int, size: int, metadata: int = 2) -> list[list[Any]]:
    row: list[Any] = [None] * 21
    row[5], row[16] = "x" * size, "x" * metadata
    return [row] * count


def test_small_events_come_in_whole_pages_after_three() -> None:
    bound, asked = PageBound(), []
    for _ in range(6):
        asked.append(bound.limit(1000))
        bound.saw(rows(asked[-1], 1 * KIB))
    assert asked == [20, 80, 320, 1000, 1000, 1000]


def test_the_first_page_is_small_whatever_it_holds() -> None:
    assert PageBound().limit(1000) * (MAX_PAYLOAD_BYTES + MAX_METADATA_BYTES) <= PAGE_BYTES


def test_large_events_make_the_next_page_small_at_once() -> None:
    bound = PageBound()
    for _ in range(4):
        bound.saw(rows(bound.limit(1000), 1 * KIB))
    bound.saw(rows(1000, 500 * KIB))
    assert 35 <= bound.limit(1000) <= PAGE_BYTES // (500 * KIB)
    for _ in range(20):
        bound.saw(rows(bound.limit(1000), 500 * KIB))
        assert bound.limit(1000) * 500 * KIB <= PAGE_BYTES
    bound.saw(rows(3, 10, metadata=2 * PAGE_BYTES))
    assert bound.limit(1000) == 1, "a page has a row, however large it is"
    bound.saw(rows(1, 1 * KIB))
    assert bound.limit(1000) == 4


def test_pages_that_are_not_full_or_empty_change_nothing_while_events_are_small() -> None:
    bound = PageBound()
    bound.saw(rows(20, 1 * KIB))
    for count in (3, 0, 79):
        bound.saw(rows(count, 1 * KIB))
        assert bound.limit(1000) == 80


def test_never_more_than_was_asked_for() -> None:
    bound = PageBound()
    for most in (7, 1, 2000, 7, 100):
        assert bound.limit(most) <= most
        bound.saw(rows(bound.limit(most), 10))
