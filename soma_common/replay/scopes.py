"""What a replay of a consumer would cover, fixed when it is recorded; and how many events that are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from soma_common.errors import ReplayRefused
from soma_common.postgres.cursor import Tick, TickReader
from soma_common.postgres.pool import Pool
from soma_common.replay.archived import Archived
from soma_common.replay.models import Plan, ReplayFilter, ReplayMode, Scope
from soma_common.replay.reading import bounds, counts
from soma_common.replay.topic_past import check_beginning
from soma_common.replay.topics import Scan, Stretch, Told, Topics, stretches
from soma_common.sql.loader import blocks


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is read: the log within ``scope``, or (where there are any) ``stretches`` of topics."""

    scope: Scope
    stretches: Sequence[Stretch] | None = None

    @property
    def offsets(self) -> list[tuple[str, int, int, int]] | None:
        """(topic, partition, first offset, end) of each stretch."""
        return None if self.stretches is None else [(*s.partition, s.first, s.end) for s in self.stretches]


class Scopes:
    """Looks what one consumer has settled.

    Args:
        topics: makes a reader of Kafka; None: there is no Kafka.
        archived: what was removed from the log.
    """

    def __init__(
        self, pool: Pool, consumer: str, topics: Callable[[], Topics] | None, archived: Archived
    ) -> None:  # fmt: skip
        self._pool, self._consumer, self._topics, self._archived = pool, consumer, topics, archived

    async def covered(self, wanted: ReplayFilter, mode: ReplayMode, source: str | None = None) -> Coverage:
        """What a replay covers: what the consumer has passed in the log, or settled in Kafka.

        Args:
            source: "log" or "kafka"; None: where the consumer reads.

        Raises:
            ReplayRefused: the consumer is unknown, or has no position there; it would reach behind the horizon of the
                inbox; Kafka does not have what it would begin with.
            BrokerUnavailable: no broker answers.
        """
        number, horizon = await self.consumer()
        if mode is ReplayMode.MISSING and horizon is not None and (wanted.since is None or wanted.since < horizon):
            told = horizon.astimezone(UTC)
            raise ReplayRefused(
                f"The inbox of {self._consumer} is whole since {told} only: before it, nobody knows what was applied.",
                cure=f"pass since={told.isoformat()} or later, or force the replay.",
            )
        rows = await self._pool.fetch(blocks("replays")["passed"], f"consumer:{self._consumer}")
        if source == "kafka" or (source is None and not rows and await self._reads_kafka(number)):
            return await self._in_kafka(number, mode)
        if not rows:
            kafka = await self._reads_kafka(number)
            raise ReplayRefused(
                f"Consumer {self._consumer} has no position in the log" + (": it reads Kafka." if kafka else "."),
                cure="replay it from Kafka." if kafka else "run it first.",
            )
        return await self._in_log(wanted, mode, number, await TickReader(self._pool).at(*rows[0]))

    async def _reads_kafka(self, number: int) -> bool:
        return bool((await self._pool.fetch(blocks("replays")["reads_kafka"], number))[0][0])

    async def _in_log(self, wanted: ReplayFilter, mode: ReplayMode, number: int, end: Tick) -> Coverage:
        """Up to the newest tick that the live consumer has passed with all its keys: it is never overtaken."""
        if mode is not ReplayMode.REBUILD:  # that reads no archives, and looks for gaps as it reads
            await self._archived.check(wanted, end.tick_id)
        first, last = await self._archived.span(wanted, *await bounds(self._pool, wanted, end))
        return Coverage(
            Scope(
                consumer_id=number, end_tick=end.tick_id, end_token=end.token, first_position=first, last_position=last
            )
        )

    async def _in_kafka(self, number: int, mode: ReplayMode) -> Coverage:
        """Up to the consumer's stored offsets. The tick only keeps the run's row company."""
        if self._topics is None:
            raise ReplayRefused(
                f"Consumer {self._consumer} reads Kafka, and no Kafka is named.",
                cure="name the application with --app, or pass topics to the engine.",
            )
        topics = self._topics()
        try:
            covered = await stretches(self._pool, topics, number)
        finally:
            await topics.close()
        if mode is ReplayMode.REBUILD:
            for stretch in covered:
                check_beginning(stretch.partition, stretch.first)
        tick = await TickReader(self._pool).latest()
        last = sum(stretch.end - stretch.first for stretch in covered)
        scope = Scope(
            consumer_id=number, end_tick=tick.tick_id, end_token=tick.token, first_position=1, last_position=last
        )
        return Coverage(scope, covered)

    async def consumer(self) -> tuple[int, datetime | None]:
        """The consumer's number, and since when its inbox is whole.

        Raises:
            ReplayRefused: it is unknown.
        """
        rows = await self._pool.fetch(blocks("replays")["consumer"], self._consumer)
        if not rows:
            raise ReplayRefused(f"No consumer {self._consumer!r:.100} is known here.", cure="check its name.")
        return rows[0][0], rows[0][1]

    async def plan(self, wanted: ReplayFilter, mode: ReplayMode, covered: Coverage, told: Told | None) -> Plan:
        """The counts of what is covered."""
        if covered.stretches is None:
            rows = await counts(self._pool, wanted, covered.scope, covered.scope.consumer_id)
            if mode is not ReplayMode.REBUILD:
                rows = await self._archived.counts(wanted, rows)
        else:
            assert self._topics is not None, "they are covered"
            topics = self._topics()
            try:
                scan = Scan(self._pool, topics, covered.scope.consumer_id)
                rows = await scan.rows(wanted, covered.stretches, told)
            finally:
                await topics.close()
        types, services, days = Counter[str](), Counter[str](), Counter[date]()
        for event_type, service, day, count, _ in rows:
            types[event_type] += count
            services[service] += count
            days[day] += count
        return Plan(
            consumer=self._consumer,
            mode=mode,
            wanted=wanted,
            total=sum(row[3] for row in rows),
            known=sum(row[4] for row in rows),
            by_type=dict(types.most_common()),
            by_service=dict(services.most_common()),
            by_day=dict(sorted(days.items())),
        )
