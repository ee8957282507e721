"""The collector as a service: an ordinary consumer of every topic that there is, or will be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from soma_common.collector.observing import observe
from soma_common.collector.storing import store
from soma_common.consumer.handlers import EVERY_TYPE, BatchContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Source
from soma_common.consumer.worker import ConsumerStats, ConsumerWorker
from soma_common.errors import ConfigurationError, InfrastructureError
from soma_common.events.models import RecordedEvent
from soma_common.kafka.admin import TopicAdmin
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.service import Service

log = logging.getLogger(__name__)

CONSUMER: Final = "collector"
PREFIX: Final = "soma."
NOT_EVENTS: Final = ("soma.stack.dlq",)
"""Topics of the stack that hold copies of dead letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorSettings:
    """What is collected.

    Args:
        prefix: topics whose names begin so.
        without: those of them that hold no events.
        look_every: seconds between two looks for topics that are new.
        consumer: how it works; it is a consumer like any other.
    """

    prefix: str = PREFIX
    without: Sequence[str] = NOT_EVENTS
    look_every: float = 30.0
    consumer: ConsumerSettings = field(default_factory=ConsumerSettings)

    def __post_init__(self) -> None:
        if isinstance(self.without, str) or not self.prefix or self.look_every <= 0:
            raise ConfigurationError(
                "The collector's settings cannot be.", cure="give a prefix, a list of topics, and seconds above 0."
            )


async def collect(events: list[RecordedEvent], ctx: BatchContext) -> None:
    """A handler of all events: keeps them, and what they tell of choreographies, in the consumer's transaction."""
    await store(events, ctx.tx)
    for event in events:
        await observe(event, ctx.tx)


class Collector(Service):
    """Keeps the central log up with all services, until it is asked to stop.

    Several share the work, as the members of any consumer group do. When a topic is new, it begins anew with it.

    Args:
        pool: the database of the central log, and of nothing else.
        admin: tells which topics there are.
        source: makes a source of topics: the group that reads them.
    """

    def __init__(
        self, pool: Pool, admin: TopicAdmin, source: Callable[[Sequence[str]], Source],
        settings: CollectorSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__("collector")
        self.settings = settings or CollectorSettings()
        self._pool, self._admin, self._source = pool, admin, source
        self._worker: ConsumerWorker | None = None
        self.away: str | None = "it has not looked for topics yet"
        """What it waits for before it can collect; None while it does, or there is no topic."""

    def stats(self) -> ConsumerStats | None:
        """Those of its consumer, while it has one."""
        return None if self._worker is None else self._worker.stats()

    async def run(self) -> None:
        """Collect; returns soon after it is asked to stop."""
        topics: list[str] = []
        waits = Backoff(base=0.2, maximum=10.0).delays()
        while not self.stopping.is_set():
            try:
                topics = await self.topics()
            except InfrastructureError as error:
                self.away = f"The topics are not known: {error}"
                log.warning("%s", self.away)
                await self.pause(next(waits))
                continue
            self.away, waits = None, Backoff(base=0.2, maximum=10.0).delays()
            if topics:
                await self._collect(topics)
            else:
                log.info("There is no topic that begins with %s yet.", self.settings.prefix)
                await self.pause(self.settings.look_every)

    async def topics(self) -> list[str]:
        """What there is to collect now.

        Raises:
            BrokerUnavailable: no broker answers.
        """
        names = await self._admin.names()
        return [name for name in names if name.startswith(self.settings.prefix) and name not in self.settings.without]

    async def _collect(self, topics: Sequence[str]) -> None:
        """As long as there are no other topics."""
        log.info("Collecting %d topics: %s", len(topics), ", ".join(topics)[:500])
        worker = ConsumerWorker(
            self._pool, CONSUMER, self._source(topics), handlers=handlers(), append=_publishes_nothing,
            settings=self.settings.consumer,
        )  # fmt: skip
        self._worker = worker
        try:
            async with worker:
                ends = {asyncio.ensure_future(worker.wait()), asyncio.ensure_future(self._changed(topics))}
                try:
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for end in ends:
                        end.cancel()
                    await asyncio.wait(ends)
        finally:
            self._worker = None

    async def _changed(self, topics: Sequence[str]) -> None:
        """Until there are other topics, or it is to stop."""
        while not await self.pause(self.settings.look_every):
            with suppress(InfrastructureError):  # of that the consumer tells
                if set(await self.topics()) != set(topics):
                    return


def handlers() -> Handlers:
    """Those of the collector's consumer."""
    made = Handlers()
    made.add(collect, EVERY_TYPE, batch=True)
    return made


async def _publishes_nothing(events: Sequence[Any], tx: Any) -> object:
    raise AssertionError("the collector publishes nothing")
