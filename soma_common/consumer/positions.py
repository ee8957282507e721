"""How far each partition is settled, while its records are worked on out of order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from soma_common.consumer.source import Partition, Record


@dataclass(slots=True)
class _Track:
    """The records of a partition that were handed out under one epoch and are not stored yet, in order."""

    epoch: int
    open: deque[Record] = field(default_factory=deque)
    done: set[int] = field(default_factory=set)
    settled: Record | None = None


class Positions:
    """Knows, for each partition, the last record before which everything is settled.

    A record is opened when it is handed out and settled when its effects (or its letter) have committed. Records of an
    epoch that is over are forgotten, so a late settlement of a former assignment moves nothing.
    """

    def __init__(self) -> None:
        self._tracks: dict[Partition, _Track] = {}
        self._open = 0

    def __len__(self) -> int:
        """How many records are handed out and not settled."""
        return self._open

    def open(self, records: Iterable[Record]) -> None:
        """Records are handed out, in the order of their partitions."""
        for record in records:
            track = self._tracks.get(record.partition)
            if track is None or track.epoch != record.epoch:
                self.forget(record.partition)
                track = self._tracks[record.partition] = _Track(record.epoch)
            track.open.append(record)
            self._open += 1

    def settle(self, records: Iterable[Record]) -> None:
        """Nothing is left to do for these records."""
        for record in records:
            track = self._tracks.get(record.partition)
            if track is None or track.epoch != record.epoch or record.offset in track.done:
                continue
            track.done.add(record.offset)
            self._open -= 1
            while track.open and track.open[0].offset in track.done:
                track.settled = track.open.popleft()
                track.done.discard(track.settled.offset)

    def moved(self) -> list[Record]:
        """The last settled record of each partition that moved since this was asked before."""
        moved = []
        for track in self._tracks.values():
            if track.settled is not None:
                moved.append(track.settled)
                track.settled = None
        return moved

    def waiting(self, partition: Partition) -> int:
        """How many records of a partition are handed out and not settled."""
        track = self._tracks.get(partition)
        return len(track.open) - len(track.done) if track is not None else 0

    def oldest(self) -> list[Record]:
        """The oldest unsettled record of each partition."""
        return [track.open[0] for track in self._tracks.values() if track.open]

    def forget(self, partition: Partition) -> None:
        """The partition is not ours any more, or is read anew."""
        track = self._tracks.pop(partition, None)
        if track is not None:
            self._open -= len(track.open) - len(track.done)
