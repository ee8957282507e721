"""Sees to it that a consumer gets on: ends handlers that take too long, and sessions in which nothing answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from soma_common.consumer.gate import Gate
from soma_common.consumer.lanes import Lane, Running
from soma_common.consumer.pipeline import Memory
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.tally import Tally
from soma_common.errors import HandlerTimeout, LeaseLost, Stalled
from soma_common.postgres.threads import ThreadTx

log = logging.getLogger(__name__)

_GRACE: Final = 5.0  # seconds in which a cancelled handler must end


class Progress:
    """When a consumer last got on, over all its sessions. Times are those of the monotonic clock."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self._seen, self._doubtful_until = 0, 0.0

    def look(self, tally: Tally, *, nothing_to_do: bool) -> None:
        """Something was done since the last look, or there is nothing to do."""
        now = time.monotonic()
        if tally.activity != self._seen or (nothing_to_do and now > self._doubtful_until):
            self._seen, self.at = tally.activity, now

    def stalled(self, doubtful: float) -> None:
        """Nothing answered: for so many seconds, having nothing to do may only mean that nothing was fetched yet."""
        self._doubtful_until = time.monotonic() + doubtful

    @property
    def idle(self) -> float:
        """Seconds without progress."""
        return time.monotonic() - self.at


class Beat:
    """When something that must come round again and again last did so; None while it need not."""

    def __init__(self) -> None:
        self.at: float | None = time.monotonic()

    def now(self) -> None:
        """It came round."""
        self.at = time.monotonic()

    def rest(self) -> None:
        """It need not come round any more."""
        self.at = None

    @property
    def missing(self) -> float:
        """Seconds since it last came round."""
        return 0.0 if self.at is None else time.monotonic() - self.at


class Watchdog:
    """Watches the lanes and the loops of one session.

    Args:
        lanes, redrives: those of live events, and those of letters.
        beats: loops by what they wait for.
        waiting: whether nothing is in flight that could move now.
        hang_up: ends the connections that the session holds.
    """

    def __init__(
        self, settings: ConsumerSettings, tally: Tally, progress: Progress, memory: Memory, *, lanes: Sequence[Lane],
        redrives: Sequence[Lane], gate: Gate, beats: Mapping[str, Beat], waiting: Callable[[], bool],
        hang_up: Callable[[], object],
    ) -> None:  # fmt: skip
        self._settings, self._tally, self._progress, self._memory = settings, tally, progress, memory
        self._lanes, self._redrives, self._gate, self._beats = lanes, redrives, gate, beats
        self._waiting, self._hang_up = waiting, hang_up
        self._seen: dict[int, tuple[tuple[Any, ...], float]] = {}

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            LeaseLost: a handler could not be ended; its connection was.
            Stalled: nothing answers; the connections of the session were ended.
        """
        while True:
            await asyncio.sleep(min(1.0, self._settings.timeout / 4, self._settings.stuck / 4))
            for lane in (*self._lanes, *self._redrives):
                if lane.work.running is not None and lane.task is not None:
                    self._handler(lane, lane.task, lane.work.running)
            why = self._silent()
            if why is not None:
                self._tally.stalls += 1
                self._progress.stalled(2 * self._settings.stuck)
                self._hang_up()
                raise Stalled(f"{why} for {self._settings.stuck:g} s: the consumer hangs up and begins anew.")
            handling = any(lane.work.running is not None for lane in self._lanes)
            self._progress.look(self._tally, nothing_to_do=handling or self._waiting())

    def _handler(self, lane: Lane, task: asyncio.Task[Any], running: Running) -> None:
        """Cancel a handler that takes too long; leave one behind that does not let itself be cancelled."""
        took = running.took
        if took > self._settings.timeout + _GRACE:
            hung = HandlerTimeout(f"The handler did not end within {took:.1f} s, not even cancelled.")
            self._memory.hung(lane.subject(running), hung)
            lane.tx.terminate()  # what it holds locked is free again, and nothing of it commits
            if not isinstance(lane.tx, ThreadTx):  # of that only the thread stays behind, not the lane's task
                raise LeaseLost(hung.message)
        if took > self._settings.timeout and lane.overdue is None:
            lane.overdue = running
            task.cancel()

    def _silent(self) -> str | None:
        """What has not answered for too long."""
        for what, beat in self._beats.items():
            if beat.missing > self._settings.stuck:
                return f"Nothing was heard of {what}"
        for lane in self._lanes:
            # Behind the gate a lane waits for other lanes, which are looked at themselves.
            narrow = self._gate.limit < len(self._lanes)
            if self._still(lane, bool(lane.working) and not narrow, (lane.task, lane.count, lane.trying)):
                return "A batch waited for PostgreSQL"
        for lane in self._redrives:
            done = self._tally.redriven + self._tally.dead + self._tally.conflicts
            if self._still(lane, lane.task is not None, (lane.task, done)):
                return "A letter waited for PostgreSQL"
        return None

    def _still(self, lane: Lane, busy: bool, signs: tuple[Any, ...]) -> bool:
        """Whether a lane is at work without a handler, and showed the same signs for too long."""
        if not busy or lane.work.running is not None:
            self._seen.pop(id(lane), None)
            return False
        before, since = self._seen.get(id(lane), (None, 0.0))
        if before is None or any(a is not b and a != b for a, b in zip(before, signs, strict=True)):
            self._seen[id(lane)] = (signs, time.monotonic())
            return False
        return time.monotonic() - since > self._settings.stuck
