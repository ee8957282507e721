"""How many lanes may work at once, found out by trying."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

_PATIENCE: Final = 100  # batches without a conflict before one more lane is let in


class Gate:
    """Halved when lanes are in each other's way, raised by one at a time while they are not."""

    def __init__(self, most: int) -> None:
        self.limit = self._most = most
        self._inside, self._smooth = 0, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        while self._inside >= self.limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
        self._inside += 1

    async def __aexit__(self, *exc: object) -> None:
        self._inside -= 1
        self._let_in()

    def conflict(self) -> None:
        """Two transactions met."""
        self.limit, self._smooth = max(1, self.limit // 2), 0

    def success(self) -> None:
        """A transaction met nobody."""
        if self.limit == self._most:
            return
        self._smooth += 1
        if self._smooth >= _PATIENCE:
            self.limit, self._smooth = self.limit + 1, 0
            self._let_in()

    def _let_in(self) -> None:
        free = self.limit - self._inside
        for turn in list(self._waiting)[: max(0, free)]:
            self._waiting.remove(turn)
            if not turn.done():
                turn.set_result(None)
