"""The relay: brings the outbox to a broker, in the order of each key, over any number of workers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from soma_common.errors import ConfigurationError, DatabaseUnavailable, SomaError, TransactionConflict
from soma_common.outbox.groups import GROUPS
from soma_common.outbox.publishing import PublisherFactory
from soma_common.outbox.pump import Pump
from soma_common.outbox.queue import Outbox
from soma_common.outbox.settings import Parts, RelaySettings
from soma_common.outbox.stats import Condition, Meter, RelayStats
from soma_common.outbox.topics import Topics
from soma_common.postgres.cursor import TickReader
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards, worker_name
from soma_common.service import Service
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

_MAINTENANCE = ("clean_outbox", "maintain_events", "merge_ticks")
_DEFAULTS = RelaySettings()


def identities(name: str = "default") -> list[str]:
    """The transactional ids (and consumer groups) of a relay's groups in exactly-once mode."""
    return [f"soma-relay-{name}-{group}" for group in range(GROUPS)]


class Relay(Service):
    """One worker of a relay. Workers of the same ``name`` share its groups, wherever they run.

    Args:
        publisher_factory: the broker's side; the relay does not close it.
        exactly_once: rows and cursor in one broker transaction per group.
        lease: seconds after which the groups of a dead worker are taken over (at most 4/3 of it).
        outbox: "external" where something else (Debezium) reads the outbox.

    Raises:
        ConfigurationError: the outbox belongs to something else.
    """

    def __init__(
        self,
        pool: Pool,
        publisher_factory: PublisherFactory,
        *,
        name: str = "default",
        exactly_once: bool = False,
        lease: float = 10.0,
        outbox: str = "internal",
        settings: RelaySettings = _DEFAULTS,
    ) -> None:
        if outbox != "internal":
            raise ConfigurationError(
                f"The outbox is {outbox}: something else brings it to Kafka.",
                cure='do not start a relay, or set outbox="internal" and stop the other reader.',
            )
        super().__init__(f"relay {name}")
        self.reader, self.exactly_once, self.lease = f"relay:{name}", exactly_once, lease
        self.worker = worker_name()
        self._identities = identities(name)
        queue = Outbox(pool, self.reader)
        self._parts = Parts(
            pool=pool,
            outbox=queue,
            shards=Shards(pool, self.reader, self.worker, lease=lease),
            ticks=TickReader(pool),
            topics=Topics(publisher_factory, queue),
            factory=publisher_factory,
            settings=settings,
            meter=Meter(),
            database=Condition("The database"),
            broker=Condition("The broker"),
        )
        self._pumps: dict[int | None, Pump] = {}
        self._tasks: dict[int | None, asyncio.Task[None]] = {}
        self._epochs: dict[int, int] = {}

    def wake(self) -> None:
        """There are new rows. Optional: losing a call costs only latency."""
        for pump in self._pumps.values():
            pump.wake()

    def stats(self) -> RelayStats:
        """How it stands."""
        parts, meter = self._parts, self._parts.meter
        idle_for = meter.idle_for()
        away = tuple(c.what for c in (parts.database, parts.broker) if c.away is not None)
        return RelayStats(
            name=self.reader.partition(":")[2],
            worker=self.worker,
            exactly_once=self.exactly_once,
            owned=tuple(sorted(parts.shards.owned)),
            relayed=meter.relayed,
            rows_per_second=meter.rate(),
            lag_rows=max((meter.lags.get(shard, 0) for shard in parts.shards.owned), default=0),
            lag_seconds=meter.lag_seconds(),
            parked=meter.parked,
            parked_now=meter.parked_now,
            errors=meter.errors,
            idle_for=idle_for,
            away=away,
            refused_topics=parts.topics.refused,
            lost_groups=dict(meter.lost),
            # Waiting for a server that is away is work, not a hang: a new process would wait just as long.
            live=bool(away) or idle_for < parts.settings.stuck,
        )

    async def run(self) -> None:
        """Relay until stopped, then drain: rows in flight are acknowledged, cursors saved, groups released."""
        side = [asyncio.create_task(self._keep_leases()), asyncio.create_task(self._maintain())]
        try:
            waiting = asyncio.create_task(self.stopping.wait())
            await asyncio.wait({waiting, *side}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            for task in side:
                task.cancel()
            results = await asyncio.gather(*side, return_exceptions=True)
            results += await self._drain()
        finally:
            for task in (*side, *self._tasks.values()):
                task.cancel()
            await asyncio.gather(*side, *self._tasks.values(), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _drain(self) -> list[BaseException | None]:
        for pump in self._pumps.values():
            pump.stop()
        tasks = set(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._parts.settings.drain)
            for task in late:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(DatabaseUnavailable):
            await self._parts.shards.release()
        return results

    # Leases.

    async def _keep_leases(self) -> None:
        registered = False
        while True:
            try:
                if not registered:
                    await self._parts.shards.register(GROUPS)
                    registered = True
                await self._share()
                self._parts.database.found()
            except DatabaseUnavailable as error:
                self._parts.database.lost(error.message)
            except TransactionConflict as error:
                log.debug("%s: the leases are renewed a little later: %s", self.name, error)
            self._watch()
            await asyncio.sleep(self.lease / 3)

    async def _share(self) -> None:
        shards, before = self._parts.shards, time.monotonic()
        surplus = await shards.share()
        for shard in [shard for shard in self._epochs if shard not in shards.owned]:
            self._lost(shard)
        for shard, lease in shards.owned.items():
            if self._epochs.get(shard) != lease.epoch:
                self._epochs[shard] = lease.epoch
                self._pump(shard).adopt(lease)
        for shard in surplus:
            self._pump(shard).give_back(shard)
        for pump in self._pumps.values():
            pump.valid_until = before + self.lease

    def _pump(self, shard: int) -> Pump:
        """The pump of a group: its own when exactly once, else the common one."""
        number = shard if self.exactly_once else None
        if number not in self._pumps:
            pump = Pump(self._parts, self._identities[shard] if self.exactly_once else None)
            self._pumps[number] = pump
            self._tasks[number] = asyncio.create_task(pump.run(), name=f"{self.name} {pump.name}")
        return self._pumps[number]

    def _lost(self, shard: int) -> None:
        del self._epochs[shard]
        self._parts.meter.lags.pop(shard, None)
        self._parts.meter.lost.pop(shard, None)
        self._pump(shard).drop(shard)

    def _watch(self) -> None:
        """A pump that ended by itself met an error that it does not know: the relay ends with it."""
        for task in self._tasks.values():
            if task.done() and not task.cancelled():
                task.result()

    # Maintenance.

    async def _maintain(self) -> None:
        parts = self._parts
        while True:
            await asyncio.sleep(parts.settings.maintenance)
            try:
                for name in _MAINTENANCE:
                    await parts.pool.fetch(blocks("readers")[name])
                counts = await parts.outbox.parked_counts()
                parts.meter.parked_now = sum(counts.get(shard, 0) for shard in parts.shards.owned)
            except DatabaseUnavailable as error:
                parts.database.lost(error.message)
            except SomaError as error:
                log.error("Maintenance of %s failed: %s", self.name, error)
