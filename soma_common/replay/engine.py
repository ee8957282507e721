"""Replays of one consumer: plan, start, run, pause, resume, cancel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any, Final
from uuid import UUID, uuid4

from soma_common.consumer.effects import Append, Effects
from soma_common.consumer.handlers import Delivery, Handlers
from soma_common.consumer.retries import RetryPolicy
from soma_common.errors import ConfigurationError, ReplayRefused, ValidationError
from soma_common.events.models import Event
from soma_common.inbox import Inbox
from soma_common.postgres.cursor import Tick, TickReader
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.applying import Batches, ForcedInbox
from soma_common.replay.archived import Archived
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import Plan, Progress, ReplayFilter, ReplayMode, ReplayState, Scope
from soma_common.replay.reading import bounds, counts
from soma_common.replay.running import Runner
from soma_common.retention.reader import ArchiveReader
from soma_common.retry import Backoff
from soma_common.sql.loader import blocks

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
    """

    batch: int = 200
    page: int = 2000
    lease: float = 10.0
    idle_timeout: float = 30.0
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.page <= 10_000:
            raise ConfigurationError(
                f"A batch of {self.batch} of pages of {self.page}.", cure="use 1 <= batch <= page <= 10000."
            )
        if not self.lease > 0:
            raise ConfigurationError(f"A lease of {self.lease} s.", cure="use a positive number of seconds.")


class ReplayEngine:
    """Replays events of the log to the handlers of one consumer, on connections of its own.

    Use it as ``async with ReplayEngine(...) as engine``, in one process or in several: a run belongs to the process
    that runs it, and another goes on exactly where that one was killed.

    Args:
        pool: the database; the engine takes its settings, not its connections.
        consumer: the consumer's name.
        handlers: its handlers; planning needs none.
        append: records new events in a transaction: ``await append(events, tx)``.
        archive: where events are that were removed from the log; without it, replays that reach them are refused.
    """

    def __init__(
        self, pool: PoolSettings, consumer: str, *,
        handlers: Handlers | None = None, append: Append | None = None, settings: ReplaySettings | None = None,
        archive: ArchiveReader | None = None,
    ) -> None:  # fmt: skip
        self.consumer, self.settings = consumer, settings or ReplaySettings()
        self._handlers, self._append = handlers or Handlers(), append or _refuse
        named = {**pool.settings, "application_name": "soma-replay"}
        self._pool = Pool(replace(pool, size=_CONNECTIONS, settings=named))
        self._checkpoints = Checkpoints(self._pool, lease=self.settings.lease)
        self._archived = Archived(self._pool, archive)

    async def __aenter__(self) -> ReplayEngine:
        await self._pool.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._pool.close()

    async def plan(self, wanted: ReplayFilter, mode: ReplayMode | str = ReplayMode.MISSING) -> Plan:
        """What a replay would read, as counts; nothing is applied or recorded. Reads every event of the filter.

        Raises:
            ReplayRefused: see :meth:`start`.
        """
        mode = _mode(mode)
        scope = await self._scope(wanted, mode)
        rows = await counts(self._pool, wanted, scope, scope.consumer_id)
        rows = await self._archived.counts(wanted, rows)
        types, services, days = Counter[str](), Counter[str](), Counter[date]()
        for event_type, service, day, count, _ in rows:
            types[event_type] += count
            services[service] += count
            days[day] += count
        return Plan(
            consumer=self.consumer,
            mode=mode,
            wanted=wanted,
            total=sum(row[3] for row in rows),
            known=sum(row[4] for row in rows),
            by_type=dict(types.most_common()),
            by_service=dict(services.most_common()),
            by_day=dict(sorted(days.items())),
        )

    async def start(
        self, wanted: ReplayFilter, mode: ReplayMode | str = ReplayMode.MISSING, *,
        rate: float | None = None, requested_by: str = "", reason: str = "",
    ) -> Progress:  # fmt: skip
        """Record a run; :meth:`run` applies it. What it covers is fixed now: what the consumer has passed in the log.

        Args:
            rate: most events per second, in all.
            requested_by, reason: who wants it and why; ``FORCE`` asks for both.

        Raises:
            ReplayRefused: the consumer is unknown or has no position in the log; it would reach behind the horizon of
                the inbox; a forced one without who and why.
            ValidationError: a rate that is none, a text with a NUL or above 1,000 characters.
        """
        mode = _mode(mode)
        _check_rate(rate)
        audit = _text("requested_by", requested_by), _text("reason", reason)
        if mode is ReplayMode.FORCE and not all(text.strip() for text in audit):
            raise ReplayRefused("A forced replay says who wants it, and why.", cure="pass requested_by and reason.")
        scope = await self._scope(wanted, mode)
        run_id = uuid4()
        await self._checkpoints.open(
            run_id, scope, wanted, mode=mode, inbox_id=scope.consumer_id, rate=rate,
            requested_by=requested_by, reason=reason,
        )  # fmt: skip
        return await self._checkpoints.find(run_id)

    async def run(self, run_id: UUID | str) -> AsyncGenerator[Progress, None]:
        """Apply a planned run, or go on with one whose process is gone; its progress after each batch.

        Ends with the state ``DONE``, or ``PAUSED`` or ``CANCELLED`` when somebody asked for it. Whoever leaves the loop
        early leaves the run to the next who runs it.

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
        batches = self._batches(run)
        runner = Runner(
            self._pool, self._checkpoints, batches, run, owner,
            batch=self.settings.batch, page=self.settings.page, backoff=self.settings.backoff,
            archived=self._archived,
        )  # fmt: skip
        async with aclosing(runner.steps()) as steps:
            async for progress in steps:
                yield progress

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
        """End a run for good; when this returns, no further effect of it commits. What it applied stays.

        Raises:
            ReplayRefused: it is over.
        """
        states = [ReplayState.PLANNED, ReplayState.RUNNING, ReplayState.PAUSED, ReplayState.FAILED]
        return await self._turn(run_id, states, ReplayState.CANCELLED)

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
        await self._checkpoints.raise_horizon((await self._consumer())[0], horizon)

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

    async def _scope(self, wanted: ReplayFilter, mode: ReplayMode) -> Scope:
        if mode is ReplayMode.REBUILD:
            raise ReplayRefused("Rebuilding is not part of this version.", cure="use missing or force.")
        number, horizon = await self._consumer()
        if mode is ReplayMode.MISSING and horizon is not None and (wanted.since is None or wanted.since < horizon):
            told = horizon.astimezone(UTC)
            raise ReplayRefused(
                f"The inbox of {self.consumer} is whole since {told} only: before it, nobody knows what was applied.",
                cure=f"pass since={told.isoformat()} or later, or force the replay.",
            )
        end = await self._passed(number)
        await self._archived.check(wanted, end.tick_id)
        first, last = await self._archived.span(wanted, *await bounds(self._pool, wanted, end))
        return Scope(
            consumer_id=number, end_tick=end.tick_id, end_token=end.token, first_position=first, last_position=last
        )

    async def _consumer(self) -> tuple[int, datetime | None]:
        rows = await self._pool.fetch(_sql("consumer"), self.consumer)
        if not rows:
            raise ReplayRefused(f"No consumer {self.consumer!r:.100} is known here.", cure="check its name.")
        return rows[0][0], rows[0][1]

    async def _passed(self, number: int) -> Tick:
        """The newest tick that the live consumer has passed with all its keys: a replay never overtakes it."""
        rows = await self._pool.fetch(_sql("passed"), f"consumer:{self.consumer}")
        if not rows:
            kafka = (await self._pool.fetch(_sql("reads_kafka"), number))[0][0]
            raise ReplayRefused(
                f"Consumer {self.consumer} has no position in the log" + (": it reads Kafka." if kafka else "."),
                cure="only consumers of the log can be replayed from it." if kafka else "run it first.",
            )
        return await TickReader(self._pool).at(*rows[0])

    def _batches(self, run: Progress) -> Batches:
        settings = self.settings
        effects = Effects(
            self.consumer, self._handlers, self._append, retry=RetryPolicy(), timeout=settings.idle_timeout
        )
        delivery = Delivery(replaying=True, external_effects=run.mode is not ReplayMode.REBUILD)
        return Batches(self._pool, self._checkpoints, effects, self._inbox(run), delivery)

    def _inbox(self, run: Progress) -> Inbox:
        kind = ForcedInbox if run.mode is ReplayMode.FORCE else Inbox
        return kind(run.inbox_id, self.settings.idle_timeout)


async def _refuse(events: Sequence[Event], tx: Any) -> object:
    raise ConfigurationError("This replay cannot record what its handlers publish.", cure="pass append.")


def _mode(mode: ReplayMode | str) -> ReplayMode:
    try:
        return ReplayMode(mode)
    except ValueError as error:
        raise ValidationError(f"{mode!r:.80} is no mode of replay.", cure="use missing, rebuild or force.") from error


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


def _sql(name: str) -> str:
    return blocks("replays")[name]
