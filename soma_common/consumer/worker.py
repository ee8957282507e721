"""A consumer as a service: fetches, applies, follows its source through losses, and drains when it stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from soma_common.consumer.dedup import Inbox, consumer_id
from soma_common.consumer.handlers import Handlers
from soma_common.consumer.pipeline import PASSING, Append, Failure, Pipeline, Tally
from soma_common.consumer.source import Partition, Record, Source
from soma_common.errors import ConfigurationError, InfrastructureError, LeaseLost, SomaError
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.service import Service

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """How a consumer works.

    Args:
        batch: most events in one transaction. A smaller one is applied as soon as there is nothing more to fetch.
        drain: seconds a batch in flight may take to finish before its partition is given away; then it is abandoned.
        idle_timeout: seconds after which PostgreSQL ends a batch's transaction whose process fell silent.
        backoff: waits while the database or the broker is away.
    """

    batch: int = 200
    drain: float = 10.0
    idle_timeout: float = 30.0
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 10_000:
            raise ConfigurationError(f"A batch of {self.batch} events.", cure="use 1 to 10000.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStats:
    """What a consumer did since it started, and how it is.

    ``away`` names what it waits for; ``failures`` are the events that stopped partitions. ``idle`` is the time in
    seconds since it last settled a batch or found that there was nothing to do.
    """

    consumer: str
    tally: Tally
    batches: int
    partitions: frozenset[Partition]
    failures: tuple[Failure, ...]
    away: str | None
    running: bool
    idle: float

    @property
    def healthy(self) -> bool:
        """Whether it makes progress on all its partitions."""
        return self.running and self.away is None and not self.failures


class ConsumerWorker(Service):
    """Runs the handlers of one consumer over a source.

    A failing event stops its partition, loudly: it is never skipped, and it is tried again after a restart. When the
    database or the broker is away, the worker says so once, waits, and goes on by itself.
    """

    def __init__(
        self, pool: Pool, consumer: str, source: Source, *,
        handlers: Handlers, append: Append, settings: ConsumerSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"consumer {consumer}")
        if not handlers:
            raise ConfigurationError(f"Consumer {consumer} has no handler.", cure="add one before it starts.")
        self.consumer, self.source = consumer, source
        self.settings = settings or ConsumerSettings()
        self._pool = pool
        self._pipeline = Pipeline(pool, consumer, handlers, append)
        self._inbox: Inbox | None = None
        self._busy: asyncio.Task[Tally] | None = None
        self._abandoned, self._ready, self._running = False, False, False
        self._tally, self._batches, self._tries = Tally(), 0, 0
        self._failures: dict[Partition, Failure] = {}
        self._away: str | None = None
        self._moved = time.monotonic()

    def stats(self) -> ConsumerStats:
        """How it stands now."""
        halted = self.source.halted
        return ConsumerStats(
            consumer=self.consumer,
            tally=self._tally,
            batches=self._batches,
            partitions=self.source.assigned,
            failures=tuple(failure for partition, failure in self._failures.items() if partition in halted),
            away=self._away,
            running=self._running,
            idle=time.monotonic() - self._moved,
        )

    async def run(self) -> None:
        """Consume until asked to stop; then finish the batch in flight and leave."""
        self._running = True
        try:
            while not self.stopping.is_set():
                await self._turn()
        finally:
            self._running = self._ready = False
            await self._leave()

    async def _turn(self) -> None:
        try:
            if not self._ready:
                await self._prepare()
            records = await self.source.fetch(self.settings.batch)
            if records:
                await self._apply(records)
            self._back()
        except LeaseLost as lost:
            log.info("%s: %s", self.name, lost)
            self._ready = False
        except PASSING as error:
            self._ready = False
            self._gone(error)
            await self.pause(self.settings.backoff.delay(self._tries))
            self._tries += 1

    async def _prepare(self) -> None:
        """Join, or begin again at the stored positions."""
        if self._inbox is None:
            self._inbox = Inbox(await consumer_id(self._pool, self.consumer), self.settings.idle_timeout)
        await self.source.start(self._inbox.consumer_id, self.drain)
        await self.source.rewind()
        self._ready = True

    async def _apply(self, records: Sequence[Record]) -> None:
        assert self._inbox is not None
        self._abandoned = False
        self._busy = asyncio.create_task(self._pipeline.apply(self.source, self._inbox, records))
        try:
            tally = await self._busy
        except asyncio.CancelledError:
            if not self._abandoned:
                raise
            raise LeaseLost(f"A batch did not finish within {self.settings.drain:.0f} s and was abandoned.") from None
        finally:
            self._busy = None
        self._tally += tally
        self._batches += 1
        self._failures |= {failure.partition: failure for failure in tally.failures}

    async def drain(self) -> None:
        """Wait until nothing is in flight, at most ``settings.drain`` seconds; then abandon it."""
        task = self._busy
        if task is None:
            return
        done, _ = await asyncio.wait({task}, timeout=self.settings.drain)
        if not done:
            self._abandoned = True
            task.cancel()
            await asyncio.wait({task}, timeout=self.settings.drain)

    def _back(self) -> None:
        self._moved, self._tries = time.monotonic(), 0
        if self._away is not None:
            log.info("%s goes on.", self.name)
            self._away = None

    def _gone(self, error: SomaError) -> None:
        """Say once that something is away; a conflict between transactions is everyday."""
        if not isinstance(error, InfrastructureError):
            log.debug("%s tries a batch again: %s", self.name, error)
        elif self._away is None:
            log.warning("%s waits: %s", self.name, error)
            self._away = error.message

    async def _leave(self) -> None:
        try:
            await self.source.stop()
        except PASSING as error:
            log.warning("%s left without saying so: %s", self.name, error)
