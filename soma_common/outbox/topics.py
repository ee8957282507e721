"""Which topics the relay may send to, with their pinned partition counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from soma_common.errors import BrokerUnavailable
from soma_common.outbox.publishing import PublisherFactory, TopicRefused
from soma_common.outbox.queue import Outbox

log = logging.getLogger(__name__)

# A topic that was made a moment ago may not be known to every broker yet.
_TRIES, _BETWEEN = 3, 0.3
REFRESH = 30.0  # seconds after which a relay looks at a topic again


@dataclass(frozen=True, slots=True)
class Verdict:
    """``refused`` says why a topic gets nothing now; None when it does. ``until`` is a monotonic time in seconds."""

    partitions: int
    refused: str | None
    until: float


class Topics:
    """Verdicts on topics, asked for again every ``refresh`` seconds.

    The first partition count ever seen is pinned in the database. A topic with another count is paused (its rows are
    parked) until an operator accepts the new count: keys would move between partitions and lose their order.
    """

    def __init__(self, factory: PublisherFactory, outbox: Outbox, *, refresh: float = REFRESH) -> None:
        self._factory, self._outbox, self._refresh = factory, outbox, refresh
        self._verdicts: dict[str, Verdict] = {}
        self._asking = asyncio.Lock()
        self.partitions: dict[str, int] = {}

    @property
    def refused(self) -> dict[str, str]:
        """Topics that get nothing now, with the reason."""
        return {topic: v.refused for topic, v in self._verdicts.items() if v.refused is not None}

    async def check(self, topics: Iterable[str]) -> dict[str, str]:
        """Those of the topics that get nothing now, with the reason.

        Raises:
            BrokerUnavailable: a topic is new and no broker answers.
        """
        found: dict[str, str] = {}
        for topic in topics:
            verdict = self._verdicts.get(topic)
            if verdict is None or verdict.until < time.monotonic():
                verdict = await self._ask(topic)
            if verdict.refused is not None:
                found[topic] = verdict.refused
        return found

    def forget(self, topic: str) -> None:
        """Ask again at the next use."""
        self._verdicts.pop(topic, None)

    async def _ask(self, topic: str) -> Verdict:
        async with self._asking:
            before = self._verdicts.get(topic)
            if before is not None and before.until >= time.monotonic():
                return before
            try:
                partitions, refused = await self._count(topic)
            except BrokerUnavailable:
                if before is None:
                    raise
                partitions, refused = before.partitions, before.refused
            _report(topic, before.refused if before else None, refused)
            verdict = Verdict(partitions, refused, time.monotonic() + self._refresh)
            self._verdicts[topic] = verdict
            self.partitions[topic] = partitions
            return verdict

    async def _count(self, topic: str) -> tuple[int, str | None]:
        for attempt in range(_TRIES):
            try:
                actual = await self._factory.partitions(topic)
                break
            except TopicRefused as error:
                if attempt == _TRIES - 1:
                    return 0, error.message
            await asyncio.sleep(_BETWEEN)
        pinned = await self._outbox.pin(topic, actual)
        if pinned == actual:
            return actual, None
        return pinned, f"paused: topic {topic} has {actual} partitions and {pinned} are pinned; accept the new count"


def _report(topic: str, before: str | None, now: str | None) -> None:
    if now is not None and now != before:
        log.error("Topic %s gets nothing, its rows are parked: %s", topic, now)
    elif before is not None and now is None:
        log.info("Topic %s is fine again; parked rows wait for unpark", topic)
