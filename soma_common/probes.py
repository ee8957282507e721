"""What a process tells about its consumers and relays: /health/live, /health/ready, /metrics, and OpenTelemetry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from soma_common.collector.collecting import Collector
from soma_common.consumer.metrics import consumer_health, consumer_metrics
from soma_common.consumer.worker import ConsumerStats, ConsumerWorker
from soma_common.dlq.gauges import LetterGauges
from soma_common.events.tally import Appends
from soma_common.gauges import DatabaseGauges
from soma_common.health import Health, HealthServer, Metric
from soma_common.outbox.metrics import relay_health, relay_metrics
from soma_common.outbox.relay import Relay
from soma_common.postgres.pool import Pool
from soma_common.process_metrics import append_metrics, pool_metrics
from soma_common.sagas.metrics import saga_health, saga_metrics, saga_stats
from soma_common.sagas.worker import SagaWorker
from soma_common.service import Service
from soma_common.tracing.meter import Meter

log = logging.getLogger(__name__)

_SHOWN_EVERY = 1.0  # seconds between two looks for OpenTelemetry


class Probes(Service):
    """Shows how services stand, as long as it runs; start it before them.

    Args:
        services: the consumers, relays, saga workers and collectors of this process.
        pool: the database whose dead letters, sagas and replays are counted, every ``letters_every`` seconds.
        stores: gives what the stores of this process have counted.
        port: where the HTTP pages are; 0 chooses a free port, None serves none (OpenTelemetry only).
        host: a probe comes from outside the pod; nothing but figures is served.
    """

    def __init__(
        self,
        services: Sequence[Service],
        pool: Pool,
        *,
        stores: Callable[[], Iterable[Appends]] = tuple,
        port: int | None = 0,
        host: str = "0.0.0.0",
        letters_every: float = 15.0,
    ) -> None:
        super().__init__("probes")
        self._consumers = [service for service in services if isinstance(service, ConsumerWorker)]
        self._collectors = [service for service in services if isinstance(service, Collector)]
        self._relays = [service for service in services if isinstance(service, Relay)]
        self._sagas = [service for service in services if isinstance(service, SagaWorker)]
        self._pool, self._stores = pool, stores
        self._letters = LetterGauges(pool, every=letters_every)
        self._database = DatabaseGauges(pool, every=letters_every)
        self._server = None if port is None else HealthServer(self.health, self.metrics, host=host, port=port)

    @property
    def port(self) -> int | None:
        """The port that is served, once started."""
        return self._server.port if self._server is not None else None

    def health(self) -> Health:
        """Live and ready when all are; the details of each."""
        parts = []
        if consuming := self._consuming():
            parts.append(consumer_health(consuming))
        parts += [Health(True, {"collector": {"away": one.away}}, one.away is None) for one in self._collectors]
        if self._relays:
            relays = relay_health([one.stats() for one in self._relays])
            parts.append(Health(relays.live, {"relay": relays.details}, relays.ready))
        if self._sagas:
            parts.append(saga_health([saga_stats(one) for one in self._sagas]))
        details = {name: value for part in parts for name, value in part.details.items()}
        return Health(all(part.live for part in parts), details, all(part.ready for part in parts))

    def metrics(self) -> Iterator[Metric]:
        """Every figure of this process."""
        yield from consumer_metrics(self._consuming())
        yield from relay_metrics([one.stats() for one in self._relays])
        yield from saga_metrics([saga_stats(one) for one in self._sagas])
        yield from append_metrics(self._stores())
        yield from pool_metrics(self._pool)
        yield from self._letters.metrics()
        yield from self._database.metrics()

    def _consuming(self) -> list[ConsumerStats]:
        collecting = [one.stats() for one in self._collectors]
        return [one.stats() for one in self._consumers] + [stats for stats in collecting if stats is not None]

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigurationError: the port is taken or not allowed.
        """
        if self._server is not None and self._task is None:
            await self._server.start()
            log.info("health and metrics on port %d", self._server.port)
        await super().start()

    async def run(self) -> None:
        """Until asked to stop."""
        counting = [
            asyncio.create_task(self._letters.run(), name="dead letters counted"),
            asyncio.create_task(self._database.run(), name="sagas and replays counted"),
        ]
        meter = Meter()
        try:
            while True:
                meter.show(self.metrics())
                if await self.pause(_SHOWN_EVERY):
                    return
        finally:
            meter.show(())
            for task in counting:
                task.cancel()
            await asyncio.gather(*counting, return_exceptions=True)
            if self._server is not None:
                await self._server.stop()
