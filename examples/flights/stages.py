"""Where a process is right now, in a page of memory that outlives it.

A worker writes its stage into a small file that is mapped into memory. After SIGKILL the page still holds what the
worker wrote last, so whoever killed it can read which stage it hit. The same page carries one wish: the stage at which
the worker shall stop and wait for its death, for kills at a point that chance hits too rarely.
"""

from __future__ import annotations

import mmap
import struct
import time
from enum import IntEnum
from pathlib import Path

_SIZE = mmap.PAGESIZE
_HOLD, _HELD, _COUNT, _SLOTS = 0, 1, 8, 16
_MOST_SLOTS = 8
_COUNTER = struct.Struct("<Q")


class Stage(IntEnum):
    """What a worker is doing."""

    STARTING = 1
    WAITING = 2
    STOPPING = 3
    HANDLING = 4
    COMMITTING = 5
    COMMITTED = 6
    PUBLISHING = 7
    ACKNOWLEDGED = 8

    @property
    def text(self) -> str:
        """What the demo prints."""
        return _TEXTS[self]


_TEXTS = {
    Stage.STARTING: "starting",
    Stage.WAITING: "between two batches",
    Stage.STOPPING: "stopping",
    Stage.HANDLING: "in the handlers",
    Stage.COMMITTING: "between the last handler and COMMIT",
    Stage.COMMITTED: "between COMMIT and the positions",
    Stage.PUBLISHING: "publishing",
    Stage.ACKNOWLEDGED: "between acknowledgement and cursor",
}


class Board:
    """The page of one process, kept over its restarts. Each loop of the process writes into a slot of its own."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _SIZE)

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()

    @property
    def stage(self) -> Stage:
        """What the process wrote last: the stage of a loop that was busy, if one was."""
        return Stage(max(self._page[_SLOTS : _SLOTS + _MOST_SLOTS]) or Stage.STARTING)

    @property
    def steps(self) -> int:
        """How much work the process has taken up since its start: events to handle, or records to send."""
        count: int = _COUNTER.unpack_from(self._page, _COUNT)[0]
        return count

    @property
    def held(self) -> bool:
        """Whether the process has reached the stage at which it was wished to wait."""
        return bool(self._page[_HELD])

    def reset(self, hold: Stage | None = None) -> None:
        """Before a start: nothing done, and the wish where the process shall wait to be killed."""
        self._page[_SLOTS : _SLOTS + _MOST_SLOTS] = bytes(_MOST_SLOTS)
        self._page[_HELD], self._page[_HOLD] = 0, hold or 0
        _COUNTER.pack_into(self._page, _COUNT, 0)

    def release(self) -> None:
        """Take the wish back."""
        self._page[_HOLD] = 0

    def enter(self, stage: Stage, steps: int = 0, *, slot: int = 0) -> None:
        """Written by the process: it is now here, ``steps`` further.

        The loop of slot 0 is the one whose steps count and which waits, blocking all the process does, where wished.
        """
        self._page[_SLOTS + slot] = stage
        if slot:
            return
        if steps:
            _COUNTER.pack_into(self._page, _COUNT, self.steps + steps)
        while self._page[_HOLD] == stage:
            self._page[_HELD] = 1
            time.sleep(0.001)
