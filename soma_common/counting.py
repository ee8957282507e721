"""Figures that are read from the database now and then, for whoever looks at a process."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import Final

from soma_common.errors import SomaError

log = logging.getLogger(__name__)

_SHARE: Final = 20  # counting may take one part in so many of the time


class Counted(ABC):
    """Knows what was counted last.

    Args:
        what: is counted, for the log.
        every: seconds between two counts; more when counting takes long.
    """

    def __init__(self, what: str, *, every: float) -> None:
        self._what, self._every = what, every
        self._at: float | None = None

    @abstractmethod
    async def count(self) -> object:
        """Count now, and say so by :meth:`counted`.

        Raises:
            SomaError: the database is away, or the role may not look; what was known stays.
        """

    def counted(self) -> None:
        """It was counted just now."""
        self._at = time.monotonic()

    @property
    def since(self) -> float | None:
        """Seconds since it was counted last; None before the first time."""
        return None if self._at is None else time.monotonic() - self._at

    async def run(self) -> None:
        """Count again and again, until cancelled."""
        told = False
        while True:
            began = time.monotonic()
            try:
                await self.count()
                told = False
            except SomaError as error:
                log.log(logging.DEBUG if told else logging.WARNING, "%s were not counted: %s", self._what, error)
                told = True
            await asyncio.sleep(max(self._every, _SHARE * (time.monotonic() - began)))
