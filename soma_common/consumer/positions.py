"""How far each partition is settled, while its records are worked on out of order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from soma_common.consumer.source import Partition, Record


@dataclass(slots=True)
class _Track:
    """The records of a partition that were handed out under one epoch and are not stored yet, in their order.

    Their offsets need not rise: those of the log are positions, and what a long transaction wrote comes late.
    ``unsettled`` are the offsets of those that are not settled, ``bytes`` is their size; ``passed`` counts those that
    went, ``fetched`` are (how many there were, when) of what was handed out together.
    """

    epoch: int
    open: deque[Record] = field(default_factory=deque)
    unsettled: set[int] = field(default_factory=set)
    passed: int = 0
    fetched: deque[tuple[int, float]] = field(default_factory=deque)
    bytes: int = 0
    settled: Record | None = None

    def drop_passed(self) -> None:
        """Forget when those were fetched that went."""
        while self.fetched and self.fetched[0][0] <= self.passed:
            self.fetched.popleft()


class Positions:
    """Knows, for each partition, the last record before which everything is settled.

    A record is opened when it is handed out and settled when its effects (or its letter) have committed. Records of an
    epoch that is over are forgotten, so a late settlement of a former assignment moves nothing.

    Args:
        most_records, most_bytes: how much of a partition may be open before it is full.
    """

    def __init__(self, most_records: int, most_bytes: int) -> None:
        self._most_records, self._most_bytes = most_records, most_bytes
        self._tracks: dict[Partition, _Track] = {}
        self._open = 0

    def __len__(self) -> int:
        """How many records are handed out and not settled."""
        return self._open

    def open(self, records: Sequence[Record]) -> None:
        """Records are handed out, in the order of their partitions."""
        for record in records:
            track = self._tracks.get(record.partition)
            if track is None or track.epoch != record.epoch:
                self.forget((record.partition,))
                track = self._tracks[record.partition] = _Track(record.epoch)
            track.open.append(record)
            track.unsettled.add(record.offset)
            track.bytes += record.size
        self._open += len(records)
        now = time.monotonic()
        for partition in {record.partition for record in records}:
            track = self._tracks[partition]
            track.drop_passed()
            track.fetched.append((track.passed + len(track.open), now))

    def settle(self, records: Iterable[Record]) -> None:
        """Nothing is left to do for these records."""
        for record in records:
            track = self._tracks.get(record.partition)
            if track is None or track.epoch != record.epoch or record.offset not in track.unsettled:
                continue
            track.unsettled.discard(record.offset)
            track.bytes -= record.size
            self._open -= 1
            while track.open and track.open[0].offset not in track.unsettled:
                track.settled = track.open.popleft()
                track.passed += 1

    def moved(self) -> list[Record]:
        """The last settled record of each partition that moved since this was asked before."""
        moved = []
        for track in self._tracks.values():
            if track.settled is not None:
                moved.append(track.settled)
                track.settled = None
        return moved

    @property
    def partitions(self) -> frozenset[Partition]:
        """The partitions of which something was handed out."""
        return frozenset(self._tracks)

    def full(self) -> frozenset[Partition]:
        """The partitions of which no more may be handed out now."""
        return frozenset(
            partition
            for partition, track in self._tracks.items()
            if len(track.open) >= self._most_records or track.bytes >= self._most_bytes
        )

    def is_settled(self, record: Record) -> bool:
        """Whether nothing is left to do for it, or its assignment is over."""
        track = self._tracks.get(record.partition)
        return track is None or track.epoch != record.epoch or record.offset not in track.unsettled

    def age(self) -> float:
        """Seconds since the oldest unsettled record was handed out; 0 when there is none."""
        oldest = time.monotonic()
        now = oldest
        for track in self._tracks.values():
            if track.open:
                track.drop_passed()
                oldest = min(oldest, track.fetched[0][1])
            else:
                track.fetched.clear()
        return now - oldest

    def forget(self, partitions: Iterable[Partition]) -> None:
        """The partitions are not ours any more, or are read anew."""
        for partition in partitions:
            track = self._tracks.pop(partition, None)
            if track is not None:
                self._open -= len(track.unsettled)
