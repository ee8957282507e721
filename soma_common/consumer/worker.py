"""A consumer as a service: one session after the other, until it is asked to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from soma_common.consumer.effects import Append, Effects
from soma_common.consumer.handlers import Handlers
from soma_common.consumer.order import sequences
from soma_common.consumer.pipeline import PASSING, Memory, Parts
from soma_common.consumer.redrive import Redriver
from soma_common.consumer.session import Session
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Source
from soma_common.consumer.tally import Tally
from soma_common.consumer.watchdog import Progress
from soma_common.dlq.alerts import Alerts
from soma_common.dlq.mirror import Mirror
from soma_common.dlq.store import DeadLetters
from soma_common.errors import ConfigurationError, InfrastructureError, LeaseLost, SomaError, Stalled
from soma_common.inbox import Inbox, LaneCount, consumer_id
from soma_common.postgres.pool import Lent, Pool, lending
from soma_common.postgres.threads import Connect, Threads, connecting
from soma_common.service import Service
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_SQL = blocks("consumer")
_STUCK_SESSIONS = 3  # as many in a row may stall before a new process is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStats:
    """What a consumer did since it started, and how it is. Times are seconds.

    Args:
        in_flight: events that are fetched and not settled; ``held`` of them wait for a next try.
        oldest: how long the oldest of them has been waiting.
        lag: how far the end of each partition is from the stored position.
        halted: partitions that stopped, and why.
        away: what the consumer waits for.
        idle: since it last settled or tried something, or found nothing to do.
        single_file: events are begun one by one, because owners of a partition kept dying.
        live: False when nothing moves for too long and nothing is known to be away: a new process would help.
        ready: it has its place at the source, and waits for nothing.
    """

    consumer: str
    tally: Tally
    partitions: frozenset[Partition]
    in_flight: int
    held: int
    oldest: float
    lag: Mapping[Partition, int]
    halted: Mapping[Partition, SomaError]
    away: str | None
    running: bool
    idle: float
    single_file: bool
    live: bool
    ready: bool

    @property
    def healthy(self) -> bool:
        """Whether it runs, waits for nothing, and no partition has stopped."""
        return self.running and self.away is None and not self.halted


class ConsumerWorker(Service):
    """Runs the handlers of one consumer over a source, many keys at once and each key in order.

    An event that fails is tried again, then parked, then dead; later events of its key wait behind it. When the
    database or the broker is away, the worker says so once, waits, and goes on by itself.

    Args:
        connect: how threads connect, where handlers are plain functions; None: by psycopg, with the pool's settings.
    """

    def __init__(
        self, pool: Pool, consumer: str, source: Source, *,
        handlers: Handlers, append: Append, settings: ConsumerSettings | None = None, connect: Connect | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"consumer {consumer}")
        if not handlers:
            raise ConfigurationError(f"Consumer {consumer} has no handler.", cure="add one before it starts.")
        self.consumer, self.source = consumer, source
        self.settings = settings or ConsumerSettings()
        source.check_drain(self.settings.drain)
        self._pool = pool
        self._effects = Effects(consumer, handlers, append, retry=self.settings.retry, timeout=self.settings.timeout)
        self._threads: Threads | None = None
        if handlers.blocking:
            self._threads = Threads(connect or connecting(pool.settings), f"soma {consumer}")
        self._tally, self._memory = Tally(), Memory()
        self._alerts = Alerts(self.settings.on_dead_letter, pool)
        self._parts: Parts | None = None
        self._session: Session | None = None
        self._running, self._tries = False, 0
        self._away: str | None = None
        self._progress, self._heard, self._silence = Progress(), False, False
        self._lent = Lent()

    def stats(self) -> ConsumerStats:
        """How it stands now."""
        session, idle = self._session, self._progress.idle
        self._tally.alerts, self._tally.alerts_lost = self._alerts.told, self._alerts.lost
        stopped = self.source.halted
        away = self._away or (session.pipeline.away if session else None)
        return ConsumerStats(
            consumer=self.consumer,
            tally=self._tally.copy(),
            partitions=self.source.assigned,
            in_flight=len(session.positions) if session else 0,
            held=session.held if session else 0,
            oldest=session.positions.age() if session else 0.0,
            lag=self.source.lag(),
            halted={partition: why for partition, why in self._memory.halted.items() if partition in stopped},
            away=away,
            running=self._running,
            idle=idle,
            single_file=session.single_file if session else False,
            # Waiting for a server that is away is work, not a hang: a new process would wait just as long.
            # Of what does not answer nobody knows that it is away.
            live=(away is not None and not self._silence) or idle < _STUCK_SESSIONS * self.settings.stuck,
            ready=self._running and self._heard and away is None and not self.stopping.is_set(),
        )

    async def run(self) -> None:
        """Consume until asked to stop; then finish what is in flight and leave."""
        self._running = True
        with lending() as self._lent:  # over all sessions: the source's own tasks outlive them
            try:
                while not self.stopping.is_set():
                    await self._turn()
            finally:
                self._running = False
                await self._leave()
                await self._alerts.stop()

    async def _turn(self) -> None:
        try:
            await self._one_session()
        except LeaseLost as lost:
            log.info("%s begins again: %s", self.name, lost)
            await self.pause(self.settings.backoff.delay(0))
        except PASSING as error:
            if isinstance(error, Stalled):
                await self._start_anew()
            self._gone(error)
            await self.pause(self.settings.backoff.delay(self._tries))
            self._tries += 1

    async def _one_session(self) -> None:
        with self._impatience():
            parts, lanes = await self._joined()
        session = self._session = Session(
            self._pool, self.source, parts, self.settings, self._tally, self._memory, self._progress,
            lanes[: self._lane_count],
        )  # fmt: skip
        try:
            await session.run(
                self.stopping, self._redriver(parts, lanes[self._lane_count :]), self._back, self._lent.hang_up
            )
        finally:
            self._session, self._heard = None, False
            with suppress(*PASSING), self._impatience():
                await self._pool.fetch(_SQL["leave_lanes"], [lane.lane_id for lane in lanes])

    @contextmanager
    def _impatience(self) -> Iterator[None]:
        """Where no watchdog looks: a connection that died unnoticed must not keep us for ever."""
        timer = asyncio.get_running_loop().call_later(self.settings.stuck, self._lent.hang_up)
        try:
            yield
        finally:
            timer.cancel()

    async def _joined(self) -> tuple[Parts, list[LaneCount]]:
        """Take our place at the source, and lanes; the last ones are for re-drives."""
        parts = await self._prepared()
        await self.source.start(parts.inbox.consumer_id, self._drain)
        await self.source.rewind()
        wanted = self._lane_count + self.settings.redrives
        rows = await self._pool.fetch(_SQL["make_lanes"], parts.inbox.consumer_id, wanted)
        return parts, [LaneCount(int(row[0]), 0) for row in rows]

    async def _start_anew(self) -> None:
        """Nothing answered: trust no connection any more."""
        self._pool.drop_idle()
        if self._threads is not None:
            await self._threads.close()
        with suppress(*PASSING), self._impatience():
            await self.source.stop()

    @property
    def _lane_count(self) -> int:
        """A lane needs a connection while it works; some are left for positions, reading and letters.

        The lanes of plain functions have connections of their own.
        """
        return self.settings.lanes if self._threads else max(1, min(self.settings.lanes, self._pool.settings.size - 2))

    async def _prepared(self) -> Parts:
        """What does not change between sessions; needs the database once."""
        if self._parts is None:
            inbox = Inbox(await consumer_id(self._pool, self.consumer), self.settings.idle_timeout)
            if self._threads is not None:
                self._threads.place = (await self._pool.fetch(_SQL["place"]))[0]
            self._parts = Parts(
                consumer=self.consumer,
                begin=self._threads.transaction if self._threads else self._pool.transaction,
                inbox=inbox,
                letters=DeadLetters(self._pool, inbox, self.name, consumer=self.consumer, mirror=self._mirror()),
                effects=self._effects,
                retry=self.settings.retry,
                sequence_of=sequences(self.settings.order),
                raw=self.source.raw,
                refuse_unknown=self.settings.unknown == "refuse",
                alerts=self._alerts,
            )
        return self._parts

    def _mirror(self) -> Mirror | None:
        return Mirror(self.settings.mirror) if self.settings.mirror is not None else None

    def _redriver(self, parts: Parts, lanes: Sequence[LaneCount]) -> Redriver:
        return Redriver(parts, self.source, self.settings, self._tally, lanes)

    async def _drain(self, partitions: Collection[Partition]) -> None:
        if self._session is not None:
            await self._session.drain(partitions)

    def _back(self) -> None:
        self._tries, self._heard, self._silence = 0, True, False
        if self._away is not None:
            log.info("%s goes on.", self.name)
            self._away = None

    def _gone(self, error: SomaError) -> None:
        """Say once that something is away; a conflict between transactions is everyday."""
        self._silence = isinstance(error, Stalled)
        if not isinstance(error, InfrastructureError):
            log.debug("%s begins again: %s", self.name, error)
        elif self._away is None:
            log.warning("%s waits: %s", self.name, error)
            self._away = error.message

    async def _leave(self) -> None:
        try:
            await self.source.stop()
        except PASSING as error:
            log.warning("%s left without saying so: %s", self.name, error)
        finally:
            if self._threads is not None:
                await self._threads.close()
