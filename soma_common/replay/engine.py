"""Replays of one consumer: plan, start, run, pause, resume, cancel."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from soma_common.consumer.effects import Append, Effects
from soma_common.consumer.handlers import Delivery, Handlers
from soma_common.consumer.pipeline import Begin
from soma_common.consumer.retries import RetryPolicy
from soma_common.errors import ConfigurationError, ReplayRefused, ValidationError
from soma_common.events.models import Event
from soma_common.inbox import Inbox
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.threads import Connect, Threads, connecting
from soma_common.ranges import check_settings
from soma_common.replay.applying import Batches, ForcedInbox
from soma_common.replay.archived import Archived
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import Plan, Progress, ReplayFilter, ReplayMode, ReplayState
from soma_common.replay.past import LogPast
from soma_common.replay.projection import Projection
from soma_common.replay.reading import LogPages
from soma_common.replay.rebuilding import Rebuilder, RebuildSettings
from soma_common.replay.rebuilds import Rebuilds
from soma_common.replay.running import Runner
from soma_common.replay.scopes import Scopes
from soma_common.replay.topic_past import TopicPast
from soma_common.replay.topics import Told, TopicPages, Topics
from soma_common.retention.reader import ArchiveReader
from soma_common.retry import Backoff
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 3  # a batch, the next page, the lease
_MOST_TEXT: Final = 1000  # characters of who and why


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How replays work.

    Args:
        batch: most events in one transaction.
        page: most events fetched by one query.
        lease: seconds after which another process may go on with the run of a silent one.
        idle_timeout: seconds after which PostgreSQL ends a batch's transaction whose process fell silent.
        backoff: waits while the database is away.
        rebuild: of rebuilds.
    """

    batch: int = 200
    page: int = 500
    lease: float = 10.0
    idle_timeout: float = 30.0
    backoff: Backoff = field(default_factory=Backoff)
    rebuild: RebuildSettings = field(default_factory=RebuildSettings)

    def __post_init__(self) -> None:
        check_settings(
            self, batch=(1, 10_000), page=(1, 10_000), lease=(0.1, 86_400), idle_timeout=(0.05, 2_000_000),
            backoff=Backoff, rebuild=RebuildSettings,
        )  # fmt: skip
        if not 1 <= self.batch <= self.page <= 10_000:
            raise ConfigurationError(
                f"A batch of {self.batch} of pages of {self.page}.", cure="use 1 <= batch <= page <= 10000."
            )


class ReplayEngine:
    """Replays events of the log to the handlers of one consumer, on connections of its own.

    Use it as ``async with ReplayEngine(...) as engine``, in one process or in several: a run belongs to the process
    that runs it, and another goes on exactly where that one was killed.

    Args:
        pool: the database; the engine takes its settings, not its connections.
        consumer: the consumer's name.
        handlers: its handlers; planning needs none.
        append: records new events in a transaction: ``await append(events, tx)``.
        topics: makes a reader of the Kafka that the consumer reads; None: there is no Kafka.
        connect: how threads connect, where handlers are plain functions; None: by psycopg, with the pool's settings.
        archive: where events are that were removed from the log; without it, replays that reach them are refused.
    """

    def __init__(
        self, pool: PoolSettings, consumer: str, *,
        handlers: Handlers | None = None, append: Append | None = None, settings: ReplaySettings | None = None,
        topics: Callable[[], Topics] | None = None, connect: Connect | None = None,
        archive: ArchiveReader | None = None,
    ) -> None:  # fmt: skip
        self.consumer, self.settings = consumer, settings or ReplaySettings()
        self._handlers, self._append = handlers or Handlers(), append or _refuse
        named = {**pool.settings, "application_name": "soma-replay"}
        size = _CONNECTIONS + self.settings.rebuild.lanes
        self._pool = Pool(replace(pool, size=size, settings=named))
        self._threads: Threads | None = None
        if self._handlers.blocking:
            self._threads = Threads(connect or connecting(self._pool.settings), "soma replay")
        self._checkpoints = Checkpoints(self._pool, lease=self.settings.lease)
        self._rebuilds = Rebuilds(self._pool, self._checkpoints)
        self._archived = Archived(self._pool, archive)
        self._scopes, self._topics = Scopes(self._pool, consumer, topics, self._archived), topics

    async def __aenter__(self) -> ReplayEngine:
        await self._pool.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._threads is not None:
            await self._threads.close()
        await self._pool.close()

    async def plan(
        self, wanted: ReplayFilter, mode: ReplayMode | str = ReplayMode.MISSING, *,
        source: str | None = None, told: Told | None = None,
    ) -> Plan:  # fmt: skip
        """What a replay would read, as counts; nothing is applied or recorded. Reads every event of the filter, in
        Kafka every record.

        Args:
            source: see :meth:`start`.
            told: of a scan of Kafka, called now and then with how many offsets were passed, of how many.

        Raises:
            ReplayRefused: see :meth:`start`.
        """
        mode = _mode(mode)
        covered = await self._scopes.covered(wanted, mode, _source(source))
        return await self._scopes.plan(wanted, mode, covered, told)

    async def start(
        self, wanted: ReplayFilter, mode: ReplayMode | str = ReplayMode.MISSING, *,
        source: str | None = None, projection: Projection | None = None, rate: float | None = None,
        requested_by: str = "", reason: str = "",
    ) -> Progress:  # fmt: skip
        """Record a run; :meth:`run` applies it. What it covers is fixed now: what the consumer has passed in the log,
        or settled in Kafka. A rebuild goes on to where the consumer is when its tables are swapped; it covers all
        events, of all tenants.

        Args:
            source: "log" or "kafka"; None: where the consumer reads.
            projection: the tables that ``REBUILD`` fills anew; they are made now, empty.
            rate: most events per second, in all.
            requested_by, reason: who wants it and why; ``FORCE`` asks for both.

        Raises:
            ReplayRefused: the consumer is unknown or has no position there; it would reach behind the horizon of the
                inbox; Kafka does not have what it would begin with; a forced one without who and why; a rebuild without
                a projection, beside another one, of a topic that lost its beginning, or of tables that cannot be
                swapped.
            ValidationError: a rate that is none, a text with a NUL or above 1,000 characters.
        """
        mode = _mode(mode)
        _check_rate(rate)
        audit = _text("requested_by", requested_by), _text("reason", reason)
        if mode is ReplayMode.FORCE and not all(text.strip() for text in audit):
            raise ReplayRefused(
                "A forced replay says who wants it, and why.", cure="pass requested_by and reason (--by and --why)."
            )
        if (mode is ReplayMode.REBUILD) != (projection is not None):
            raise ReplayRefused(
                f"A replay of mode {mode} {'names no' if projection is None else 'fills no new'} tables.",
                cure="pass a projection (--table) with mode=REBUILD, and only there.",
            )
        covered = await self._scopes.covered(wanted, mode, _source(source))
        order: dict[str, Any] = {"rate": rate, "requested_by": requested_by, "reason": reason}
        if projection is not None:
            run_id = await self._rebuilds.open(covered.scope, wanted, projection, offsets=covered.offsets, **order)
        else:
            run_id = uuid4()
            await self._checkpoints.open(run_id, covered.scope, wanted, mode=mode, offsets=covered.offsets, **order)
        return await self._checkpoints.find(run_id)

    async def run(self, run_id: UUID | str, *, swap: bool = True) -> AsyncGenerator[Progress, None]:
        """Apply a planned run, or go on with one whose process is gone; its progress after each batch.

        Ends with the state ``DONE``, or ``PAUSED`` or ``CANCELLED`` when somebody asked for it. Whoever leaves the loop
        early leaves the run to the next who runs it.

        Args:
            swap: False: a rebuild ends when its tables have caught up; run again, it goes on and swaps them.

        Raises:
            ReplayRefused: it is another consumer's, another process is at it, or it is paused, failed or over.
            HandlerFailed: an event failed. The run is ``FAILED``; resumed, it goes on with that event.
            LeaseLost: this process was silent for longer than the lease, and another one took the run.
        """
        found = await self._mine(run_id)
        if not self._handlers:
            raise ConfigurationError(f"Consumer {self.consumer} has no handler.", cure="pass handlers.")
        owner = uuid4()
        run = await self._checkpoints.claim(found.run_id, owner)
        if self._threads is not None:
            self._threads.place = (await self._pool.fetch(blocks("consumer")["place"]))[0]
        rebuilds = run.mode is ReplayMode.REBUILD
        async with self._topics_of(run) as topics:
            if rebuilds:
                runner: Runner | Rebuilder = await self._rebuilder(run, owner, topics, swap=swap)
            else:
                runner = self._runner(run, owner, topics)
            async with aclosing(runner.steps()) as steps:
                async for progress in steps:
                    yield progress
        await self._clean_after(runner.run)

    @asynccontextmanager
    async def _topics_of(self, run: Progress) -> AsyncIterator[Topics | None]:
        """The Kafka that a run reads; None: it reads the log."""
        if run.source != "kafka":
            yield None
            return
        if self._topics is None:
            raise ReplayRefused(f"Replay {run.run_id} reads Kafka, and no Kafka is named.", cure="pass topics.")
        topics = self._topics()
        try:
            yield topics
        finally:
            await topics.close()

    def _runner(self, run: Progress, owner: UUID, topics: Topics | None) -> Runner:
        settings, pool = self.settings, self._pool
        return Runner(
            pool, self._checkpoints, self._batches(run), run, owner,
            pages=lambda run: LogPages(pool, run, self._archived) if topics is None else TopicPages(pool, topics, run),
            batch=settings.batch, page=settings.page, backoff=settings.backoff,
        )  # fmt: skip

    async def _rebuilder(self, run: Progress, owner: UUID, topics: Topics | None, *, swap: bool) -> Rebuilder:
        settings, pool, shadow = self.settings, self._pool, await self._rebuilds.shadow(run)
        return Rebuilder(
            pool, self._begin, self._checkpoints, self._effects(_dropped), run, shadow, owner,
            past=lambda run: LogPast(pool, run) if topics is None else TopicPast(pool, topics, run),
            settings=settings.rebuild, silence=settings.idle_timeout, backoff=settings.backoff, swap=swap,
        )  # fmt: skip

    async def _clean_after(self, run: Progress) -> None:
        try:
            await self._rebuilds.clean(run)
        except ReplayRefused as error:  # it has done its work
            log.warning("Rebuild %s is done, and its old tables are still there: %s", run.run_id, error)

    async def pause(self, run_id: UUID | str) -> Progress:
        """Stop a run; when this returns, no further effect of it commits.

        Raises:
            ReplayRefused: it is over, or failed.
        """
        return await self._turn(run_id, [ReplayState.PLANNED, ReplayState.RUNNING], ReplayState.PAUSED)

    async def resume(self, run_id: UUID | str) -> Progress:
        """Let a paused or failed run be run again, from where it stands.

        Raises:
            ReplayRefused: it is neither.
        """
        return await self._turn(run_id, [ReplayState.PAUSED, ReplayState.FAILED], ReplayState.PLANNED)

    async def cancel(self, run_id: UUID | str) -> Progress:
        """End a run for good; when this returns, no further effect of it commits. What it applied stays, but for a
        rebuild: its tables are dropped.

        Raises:
            ReplayRefused: it is over.
        """
        states = [ReplayState.PLANNED, ReplayState.RUNNING, ReplayState.PAUSED, ReplayState.FAILED]
        cancelled = await self._turn(run_id, states, ReplayState.CANCELLED)
        await self._rebuilds.clean(cancelled)
        return cancelled

    async def clean(self, run_id: UUID | str) -> None:
        """Drop what a rebuild that is over left behind, when its process ended before it did so itself.

        Raises:
            ReplayRefused: there is no such run of this consumer, or somebody still reads the tables.
        """
        await self._rebuilds.clean(await self._mine(run_id))

    async def progress(self, run_id: UUID | str) -> Progress:
        """A run as it stands.

        Raises:
            ReplayRefused: there is no such run of this consumer.
        """
        return await self._mine(run_id)

    async def raise_horizon(self, horizon: datetime) -> None:
        """Say that this consumer's inbox may have forgotten events with a timestamp before ``horizon``.

        It only moves forward. Commit it before deleting from the inbox: ``MISSING`` replays refuse to go behind it.
        """
        await self._checkpoints.raise_horizon((await self._scopes.consumer())[0], horizon)

    async def _turn(self, run_id: UUID | str, before: Sequence[ReplayState], to: ReplayState) -> Progress:
        found = await self._mine(run_id)
        if not await self._checkpoints.turn(found.run_id, before, to):
            now = await self._checkpoints.find(found.run_id)
            raise ReplayRefused(f"Replay {run_id} is {now.state}, it cannot become {to}.")
        return await self._checkpoints.find(found.run_id)

    async def _mine(self, run_id: UUID | str) -> Progress:
        found = await self._checkpoints.find(run_id)
        if found.consumer != self.consumer:
            raise ReplayRefused(
                f"Replay {run_id} is of consumer {found.consumer}, not of {self.consumer}.", cure="name that consumer."
            )
        return found

    def _effects(self, append: Append) -> Effects:
        timeout = self.settings.idle_timeout
        return Effects(self.consumer, self._handlers, append, retry=RetryPolicy(), timeout=timeout)

    def _batches(self, run: Progress) -> Batches:
        delivery = Delivery(replaying=True)
        return Batches(self._begin, self._checkpoints, self._effects(self._append), self._inbox(run), delivery)

    @property
    def _begin(self) -> Begin:
        """How a transaction begins that handlers work in."""
        return self._threads.transaction if self._threads else self._pool.transaction

    def _inbox(self, run: Progress) -> Inbox:
        kind = ForcedInbox if run.mode is ReplayMode.FORCE else Inbox
        return kind(run.inbox_id, self.settings.idle_timeout)


async def _dropped(events: Sequence[Event], tx: Any) -> object:
    """What handlers publish in a rebuild was published when its causes were live."""
    return None


async def _refuse(events: Sequence[Event], tx: Any) -> object:
    raise ConfigurationError("This replay cannot record what its handlers publish.", cure="pass append.")


def _mode(mode: ReplayMode | str) -> ReplayMode:
    try:
        return ReplayMode(mode)
    except ValueError as error:
        raise ValidationError(f"{mode!r:.80} is no mode of replay.", cure="use missing, rebuild or force.") from error


def _source(source: str | None) -> str | None:
    if source not in (None, "log", "kafka"):
        raise ValidationError(f"{source!r:.80} is no source of a replay.", cure="use log or kafka.")
    return source


def _check_rate(rate: float | None) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or rate <= 0:
        raise ValidationError(f"A rate of {rate!r:.80}.", cure="use a positive number of events per second.")


def _text(name: str, value: str) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > _MOST_TEXT or not value.isprintable():
        raise ValidationError(
            f"{name} {value!r:.80} is not a line of text.", cure=f"use up to {_MOST_TEXT} characters."
        )
    return value
