"""How far a partition is settled, where offsets do not rise: what a long transaction wrote to the log comes late."""

from __future__ import annotations

from soma_common.consumer.positions import Positions
from soma_common.consumer.source import Partition, Record

LOG = Partition("consumer:billing", 1)


def records(*offsets: int, epoch: int = 1) -> list[Record]:
    """Records of one partition, in the order of the log."""
    return [Record(LOG, offset, epoch, offset + 1, None, None, None, 10) for offset in offsets]


def test_what_is_settled_stays_so_when_older_positions_come_after_it() -> None:
    positions = Positions(100, 10_000)
    first, late = records(740, 741), records(378, 379, 742)
    positions.open(first)
    positions.settle(first)
    positions.open(late)
    assert all(positions.is_settled(record) for record in first)
    assert not any(positions.is_settled(record) for record in late)


def test_older_positions_behind_what_is_open_are_not_settled() -> None:
    positions = Positions(100, 10_000)
    here = records(740, 378, 379)
    positions.open(here)
    assert [positions.is_settled(record) for record in here] == [False, False, False]
    positions.settle(here[1:])
    assert positions.moved() == []
    assert len(positions) == 1
    positions.settle(here[:1])
    assert [record.offset for record in positions.moved()] == [379]
    assert (len(positions), positions.full()) == (0, frozenset())


def test_age_is_told_whatever_the_order() -> None:
    positions = Positions(100, 10_000)
    positions.open(records(740, 741, 378))
    older = positions.age()
    positions.open(records(742))
    positions.settle(records(740, 741, 378))
    assert older >= 0
    assert positions.age() >= 0


def test_what_nobody_asks_for_is_not_kept() -> None:
    """Where no probe asks how old the oldest record is, what is needed to tell must not pile up."""
    positions = Positions(100, 10_000)
    for offset in range(1000):
        here = records(offset)
        positions.open(here)
        positions.settle(here)
    (track,) = positions._tracks.values()
    assert len(track.fetched) <= 2


def test_what_is_forgotten_counts_no_more() -> None:
    positions = Positions(2, 10_000)
    here = records(740, 378)
    positions.open(here)
    assert positions.full() == {LOG}
    positions.settle(here[1:])
    positions.forget([LOG])
    assert (len(positions), positions.full(), positions.is_settled(here[0])) == (0, frozenset(), True)
