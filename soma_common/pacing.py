"""A token bucket on this process's own clock: how fast replays and re-drives may go."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Lets ``rate`` events through per second, at most ``burst`` at once; without a rate, all of them.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, rate: float | None, *, burst: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._burst, self._clock = rate, max(1.0, burst), clock
        self._tokens, self._at = self._burst, clock()

    def take(self, count: int) -> float:
        """Take so many tokens; the seconds to wait before going on. May go into debt: the next one waits for it."""
        if self.rate is None:
            return 0.0
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self.rate) - count
        self._at = now
        return max(0.0, -self._tokens / self.rate)
