"""A central log in a test, and the collectors that fill it: in this process, and in others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

from soma_common.collector.collecting import Collector, CollectorSettings
from soma_common.config import SomaConfig
from soma_common.deployment import DeployMode
from soma_common.events.append import AppendSettings
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import PayloadModels
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.kafka.admin import TopicAdmin
from soma_common.postgres.pool import Pool
from soma_common.testing import eventually
from soma_common.wiring import open_ground
from tests.sessions import cut_all


class Central:
    """The database of a central log, and the services whose topics begin with ``prefix``."""

    def __init__(self, dsn: str, bootstrap: str, prefix: str, services: Sequence[Any]) -> None:
        self.dsn, self.bootstrap, self.prefix, self.services = dsn, bootstrap, prefix, services
        self.pool = Pool(dsn)
        self.store = EventStore(self.pool, AppendSettings("tests"))

    async def __aenter__(self) -> Self:
        await self.pool.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.pool.close()

    @asynccontextmanager
    async def collector(self, **settings: Any) -> AsyncIterator[Collector]:
        """One in this process."""
        config = SomaConfig(
            mode=DeployMode.SOMASTACK, service_id=self._name, postgres_dsn=self.dsn, kafka_bootstrap=self.bootstrap
        )
        ground = await open_ground(config, PayloadModels(), lambda event: config.topic)
        admin = TopicAdmin(self.bootstrap)
        chosen = CollectorSettings(**{"prefix": self.prefix, "look_every": 0.5} | settings)
        try:
            async with Collector(ground.pool, admin, lambda topics: ground.source("collector", topics), chosen) as one:
                yield one
        finally:
            await admin.close()
            await ground.close()

    @contextmanager
    def process(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """``somastack collect``, killed at the end if it still runs."""
        env = os.environ | {
            "SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": self.dsn, "SOMA_SERVICE_ID": self._name,
            "SOMASTACK_KAFKA_BOOTSTRAP": self.bootstrap, "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "soma_common.cli.main", "collect", "--prefix", self.prefix, *options]
        with subprocess.Popen([*command, "--look-every", "0.5"], env=env, stderr=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def _name(self) -> str:
        """A group of this test's own: the broker is shared."""
        return "c" + self.prefix.strip(".").rpartition(".")[2]

    async def has(self, count: int) -> None:
        """Until it has so many events."""

        async def enough() -> bool:
            return bool((await self.pool.fetch("SELECT count(*) FROM soma.events"))[0][0] >= count)

        await eventually(enough, within=90, what=f"collecting {count} events")

    async def events(self) -> list[RecordedEvent]:
        """All, in the order of the central log."""
        found = []
        after = 0
        while after is not None:
            page = await self.store.query(tenant_id=ALL_TENANTS, limit=10_000, after=after)
            found += page.events
            after = page.next_after  # type: ignore[assignment]
        return found

    async def cut(self) -> None:
        """End every connection to its database."""
        await cut_all(self.dsn)
