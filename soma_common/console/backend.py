"""What the console stands on: bounded connections, and the library's own doors to events, letters, sagas, replays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.app import Soma
from soma_common.config import SomaConfig
from soma_common.console.settings import ConsoleSettings
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import RawRecord
from soma_common.errors import CodecError
from soma_common.events.append import AppendSettings
from soma_common.events.codec import Codec, JsonCodec, placed
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import PayloadModels
from soma_common.events.store import ALL_TENANTS, AllTenants, EventStore
from soma_common.events.upcasting import Upcasters
from soma_common.postgres.pool import Pool, PoolSettings, Row
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.engine import ReplayEngine
from soma_common.sagas.models import Saga
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.sql.loader import blocks
from soma_common.wiring import make_codec

_SLOW: Final = 12  # a statement in the background may take so many times as long as one of a page
_JSON: Final = JsonCodec()


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts of an open console. ``slow`` is for what runs in the background. ``app``: the application whose models
    check edited values and whose handlers replays run; None: there is none.
    """

    pool: Pool
    slow: Pool
    codec: Codec
    app: Soma | None

    @property
    def store(self) -> EventStore:
        """Recorded events."""
        return EventStore(self.pool, AppendSettings("console"))

    @property
    def sagas(self) -> SagaOrchestrator:
        """Sagas."""
        return SagaOrchestrator(self.pool, self.definitions)

    @property
    def definitions(self) -> tuple[Saga, ...]:
        """The sagas of the application, if one was named."""
        return self.app.saga_definitions if self.app is not None else ()

    @property
    def models(self) -> tuple[PayloadModels, Upcasters] | None:
        """What payloads are checked with."""
        return (self.app.models, self.app.upcasters) if self.app is not None else None

    @property
    def runs(self) -> Checkpoints:
        """Replays as they stand."""
        return Checkpoints(self.pool)

    def letters(self, who: str, *, slow: bool = False) -> DLQHandler:
        """Dead letters, for somebody."""
        return DLQHandler(self.slow if slow else self.pool, who=who)

    def engine(self, consumer: str) -> ReplayEngine:
        """Replays of a consumer; those of the application can be run."""
        if self.app is not None and consumer in self.app.consumers:
            return self.app.replays(consumer)
        return ReplayEngine(self.slow.settings, consumer)

    async def fetch(self, name: str, *args: Any) -> list[Row]:
        """The rows of a named statement, planned for these very values."""
        return await self.pool.fetch_planned(blocks("console")[name], *args)

    async def of_tenant(self, name: str, tenant: str | AllTenants, *args: Any) -> list[Row]:
        """The rows of a statement that has a second form for one tenant, who is its last parameter."""
        if tenant is ALL_TENANTS:
            return await self.fetch(name, *args)
        return await self.fetch(f"{name}_of_tenant", *args, tenant)

    async def event_in(self, record: RawRecord) -> RecordedEvent:
        """The event in a record, whatever it is written in.

        Raises:
            CodecError: there is none in it, or its schema is not known.
        """
        value, headers = record.value or b"", {name: value or b"" for name, value in record.headers}
        if value.lstrip()[:1] == b"{":
            return placed(_JSON.decode(value), headers)
        if isinstance(self.codec, AvroCodec):
            await self.codec.ensure(value, headers)
            return placed(self.codec.decode(value, headers), headers)
        raise CodecError("This is no JSON, and the console knows no registry.", cure="set SOMASTACK_REGISTRY_URL.")


def bounded(dsn: str, config: SomaConfig, settings: ConsoleSettings) -> tuple[PoolSettings, PoolSettings]:
    """Connections of pages, and those for the background, whose statements may take longer."""
    pages = PoolSettings(
        dsn, size=settings.pool_size, transaction_pooler=config.postgres_pooler,
        settings=_session(config, settings.query_timeout, "soma-console"),
    )  # fmt: skip
    slow = settings.query_timeout * _SLOW
    return pages, replace(pages, size=2, settings=_session(config, slow, "soma-console-work"))


def _session(config: SomaConfig, timeout: float, name: str) -> dict[str, str]:
    """Behind a transaction pooler sessions have no settings: there the bound of a whole page holds."""
    bound = {} if config.postgres_pooler else {"statement_timeout": str(int(timeout * 1000))}
    return {"application_name": name, **bound}


@asynccontextmanager
async def open_backend(
    config: SomaConfig, dsn: str, settings: ConsoleSettings, app: Soma | None = None
) -> AsyncIterator[Backend]:
    """Connect."""
    async with AsyncExitStack() as stack:
        if app is not None:
            await stack.enter_async_context(app)
        codec = await make_codec(config, PayloadModels(), stack)
        pages, slow = [await stack.enter_async_context(Pool(each)) for each in bounded(dsn, config, settings)]
        yield Backend(pages, slow, codec, app)
