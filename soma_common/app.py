"""An application on the library: one object that wires store, handlers and consumers by the settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self, TypeVar, Unpack
from weakref import WeakSet

from soma_common.blocking import BlockingTransactions
from soma_common.config import SomaConfig
from soma_common.consumer.handlers import Handle, Handlers, check_consumer, check_types
from soma_common.consumer.order import Order
from soma_common.consumer.settings import ConsumerSettings, SettingsByConsumer
from soma_common.consumer.worker import ConsumerWorker
from soma_common.current import closed, opened
from soma_common.decorators import Traced, TraceOptions, trace_transaction
from soma_common.errors import ConfigurationError
from soma_common.events.append import Expected, Published
from soma_common.events.models import ANY, Event, RecordedEvent
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.events.store import EventStore
from soma_common.events.tally import Appends
from soma_common.events.upcasting import Upcasters, typed
from soma_common.outbox.relay import Relay
from soma_common.postgres.lending import lender_of
from soma_common.postgres.pool import Pool
from soma_common.postgres.threads import Connect, connecting
from soma_common.probes import Probes
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.retention.reader import ArchiveReader
from soma_common.routing import Routes
from soma_common.sagas.announcing import ANNOUNCEMENTS
from soma_common.sagas.choreography import Choreography, check_choreographies
from soma_common.sagas.models import Saga, check_sagas
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.participation import Participant
from soma_common.sagas.receiving import CONSUMER as REPLIES_CONSUMER
from soma_common.sagas.receiving import REPLIES, receive
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.worker import SagaWorker
from soma_common.scopes import Mode
from soma_common.service import Service, run_until_signalled
from soma_common.sync import EventStore as SyncEventStore
from soma_common.transactions import TransactionScope
from soma_common.tx import Tx
from soma_common.wiring import Ground, ensure_topics, open_ground, send_spans, sync_settings

log = logging.getLogger(__name__)

Declared = TypeVar("Declared", bound=Handle)  # a handler keeps its own type: a unit test calls it plainly


class Soma:
    """The application: publish events, declare handlers, run.

        soma = Soma.from_env(service_id="shop", models=PayloadModels(OrderPlaced))

        @soma.handler(OrderPlaced, consumer="billing")
        async def bill(event, ctx): ...

        async with soma:
            await soma.publish(Event(...))

    The same code runs in every deployment mode; the settings say whether consumers read Kafka or the log itself.

    Args:
        config: see :class:`SomaConfig`; ``from_env`` reads it from the environment.
        models: the payload models of the events this application publishes or handles.
        upcasters: bring payloads of older versions to the newest one.
        topics: Kafka topics by event type, where they differ from ``config.topic``.
        reads: Kafka topics by consumer, where it reads others than this application's own.
        settings: how its consumers work: all of them, or by name; those that are not named have the defaults.
        sagas: the definitions of the sagas that its workers run.
        choreographies: those that it takes part in. Each has a consumer of its own, ``choreography.<name>``, which in
            Kafka also reads the topic where the services of choreographies meet.
        django: the alias of Django's database, where handlers that are plain functions work with Django's connection;
            None: they work with psycopg's. It must be the database of the event log.
    """

    def __init__(
        self,
        config: SomaConfig,
        *,
        models: PayloadModels | None = None,
        upcasters: Upcasters | None = None,
        topics: Mapping[str, str] | None = None,
        reads: Mapping[str, Sequence[str]] | None = None,
        settings: ConsumerSettings | Mapping[str, ConsumerSettings] | None = None,
        sagas: Iterable[Saga] = (),
        choreographies: Iterable[Choreography] = (),
        django: str | None = None,
    ) -> None:
        for name, given, kind in (
            ("config", config, SomaConfig), ("models", models, PayloadModels), ("upcasters", upcasters, Upcasters),
        ):  # fmt: skip
            if given is not None and not isinstance(given, kind):
                raise ConfigurationError(
                    f"{name} is a {type(given).__name__}, not a {kind.__name__}.", cure=f"pass {kind.__name__}(…)."
                )
        self.config = config
        self.models = models or PayloadModels()
        self.upcasters = upcasters or Upcasters()
        self._routes = Routes(config.topic, topics, reads)
        self._settings, self._django = SettingsByConsumer(settings), django
        if self._settings.mirrors and not config.uses_kafka:
            raise ConfigurationError(
                "Dead letters cannot be copied to Kafka in standalone mode: there is none.",
                cure="leave ConsumerSettings(mirror=...) away in this mode.",
            )
        self._handlers: dict[str, Handlers] = {}
        self._sagas = check_sagas(sagas)
        self._take_part(check_choreographies(choreographies))
        self._saga_workers: WeakSet[SagaWorker] = WeakSet()
        self._orchestrator: SagaOrchestrator | None = None
        self._ground: Ground | None = None
        # Transactions of plain functions; used by trace_transaction.
        self.blocking = BlockingTransactions(
            lambda: SyncEventStore(sync_settings(config, self.models, self._routes.of)),
            lambda: lender_of(lambda: self.pool.settings, django),
        )
        self._users = 0
        self._opening = asyncio.Lock()

    def _take_part(self, choreographies: Sequence[Choreography]) -> None:
        """Declare the handlers of choreographies, and what hands the replies of other services to sagas."""
        for each in choreographies:
            self._handlers[each.consumer] = Participant(each, self.config.service_id, self._typed).handlers()
            self._routes.hears_sagas(each.consumer)
        if choreographies:
            self.models = PayloadModels(*self.models.values(), *ANNOUNCEMENTS.values())
        if any(saga.asks for saga in self._sagas):
            self.handler(*REPLIES, consumer=REPLIES_CONSUMER)(receive)
            self._routes.hears_sagas(REPLIES_CONSUMER, nothing_else=True)

    @classmethod
    def from_env(cls, *, service_id: str | None = None, env: Mapping[str, str] | None = None, **arguments: Any) -> Self:
        """The application with the settings of the environment (docs/reference/configuration.md).

        Raises:
            ConfigurationError: a variable is missing or wrong; the message names it.
        """
        return cls(SomaConfig.from_env(env, service_id=service_id), **arguments)

    def handler(
        self, *types: str | type[Payload], consumer: str = "default", batch: bool = False
    ) -> Callable[[Declared], Declared]:
        """Declare an ``async def handle(event, ctx)`` for event types or payload models, or a plain ``def``.

        Each consumer has a position of its own; handlers of one consumer share a transaction. The function is returned
        as it is. With ``batch`` it takes a list of events. Plain functions run in threads, with psycopg's connections
        or Django's (see ``django``).

        Raises:
            ConfigurationError: the function or a type is none that a handler can have, or the consumer has no name.
        """
        check_types(types)
        check_consumer(consumer)

        def declare(handle: Declared) -> Declared:
            handlers = self._handlers.get(consumer) or Handlers(self._typed)
            handlers.add(handle, *types, batch=batch)
            self._handlers[consumer] = handlers
            return handle

        return declare

    @property
    def consumers(self) -> tuple[str, ...]:
        """The names of the declared consumers."""
        return tuple(self._handlers)

    @property
    def declared(self) -> Mapping[str, Handlers]:
        """The handlers of each consumer, by its name."""
        return MappingProxyType(self._handlers)

    @property
    def pool(self) -> Pool:
        """Connections to the application's database."""
        return self._open_ground.pool

    @property
    def store(self) -> EventStore:
        """The event store."""
        return self._open_ground.store

    @property
    def sagas(self) -> SagaOrchestrator:
        """Starts sagas, and tells where they stand."""
        if self._orchestrator is None:
            self._orchestrator = SagaOrchestrator(self._open_ground.pool, self._sagas, woken=self._wake_sagas)
        return self._orchestrator

    @property
    def saga_definitions(self) -> tuple[Saga, ...]:
        """The sagas that it was made with."""
        return self._sagas

    async def publish(
        self, events: Event | Iterable[Event], *, expected_version: Expected = ANY, tx: Any | None = None
    ) -> Published:
        """Record events; see :meth:`EventStore.publish`."""
        return await self.store.publish(events, expected_version=expected_version, tx=tx)

    def transaction(self, *, mode: Mode = "join") -> TransactionScope:
        """A transaction for writes and events: ``async with soma.transaction() as tx``; see ``TransactionScope``."""
        return TransactionScope(self.store, mode=mode)

    def sync_store(self) -> SyncEventStore:
        """A store for synchronous code (Django, psycopg): the same models, codec and topics. It publishes on
        connections that the caller opened; this application need not be open. There is one per application.

        Raises:
            RegistryUnavailable: the registry is away, and there are schemas that it was not asked for before.
        """
        return self.blocking.store

    def sync_transaction(self, *, mode: Mode = "join") -> AbstractContextManager[Tx]:
        """The same for plain functions: on Django's connection where this has one (see ``django``), else psycopg's."""
        return self.blocking.scope(mode=mode)

    def trace_transaction(self, **options: Unpack[TraceOptions]) -> Traced:
        """:func:`soma_common.trace_transaction` for this application."""
        return trace_transaction(app=self, **options)

    def _handlers_of(self, name: str) -> Handlers:
        handlers = self._handlers.get(name)
        if handlers is None:
            known = ", ".join(self._handlers) or "none"
            raise ConfigurationError(
                f"No consumer is called {name!r}.", cure=f"declare handlers for it; known: {known}."
            )
        return handlers

    def replays(
        self, consumer: str = "default", *, settings: ReplaySettings | None = None, archive: ArchiveReader | None = None
    ) -> ReplayEngine:  # fmt: skip
        """Replays of a declared consumer, on connections of their own: ``async with soma.replays(…) as engine``.

        ``archive`` has what retention removed from the log.
        """
        ground, handlers = self._open_ground, self._handlers_of(consumer)
        if self._settings.of(consumer, self._handlers).order is Order.PARTITION:
            settings = settings or ReplaySettings()
            settings = replace(settings, rebuild=replace(settings.rebuild, lanes=1))  # in the order of the log
        return ReplayEngine(
            ground.pool.settings, consumer, handlers=handlers, append=_append(ground.store), settings=settings,
            topics=ground.topics(), connect=self._connect(handlers), archive=archive,
        )  # fmt: skip

    def consumer(self, name: str = "default") -> ConsumerWorker:
        """A new worker of a declared consumer; start it, or hand it to ``run_until_signalled``."""
        handlers = self._handlers_of(name)
        ground = self._open_ground
        source = ground.source(name, self._routes.read_by(name))
        return ConsumerWorker(
            ground.pool, name, source, handlers=handlers, append=_append(ground.store),
            settings=self._settings.of(name, self._handlers), connect=self._connect(handlers),
        )  # fmt: skip

    def saga_worker(self, *, settings: SagaSettings | None = None) -> SagaWorker:
        """A new worker of the sagas that this application was made with; start it, or hand it to
        ``run_until_signalled``."""
        if not self._sagas:
            raise ConfigurationError("There are no sagas to run.", cure="pass Soma(sagas=[...]).")
        ground = self._open_ground
        blocking = any(saga.has_blocking_transactions for saga in self._sagas)
        worker = SagaWorker(
            ground.pool, self._sagas, append=_append(ground.store), settings=settings,
            connect=connecting(ground.pool.settings, self._django) if blocking else None,
        )  # fmt: skip
        self._saga_workers.add(worker)
        return worker

    def _wake_sagas(self) -> None:
        for worker in self._saga_workers:
            worker.wake()

    def _connect(self, handlers: Handlers) -> Connect | None:
        return connecting(self.pool.settings, self._django) if handlers.blocking else None

    def relay(self) -> Relay:
        """An outbox relay of this application; start it, or hand it to ``run_until_signalled``."""
        return self._open_ground.relay()

    def probes(self, *services: Service, port: int | None = 0) -> Probes:
        """Health and metrics of consumers and relays of this process, as a service to start before them.

        Serves /health/live, /health/ready and /metrics on ``port`` (0: a free one; None: OpenTelemetry only).
        """
        return Probes(services, self.pool, port=port, stores=self._appends)

    def _appends(self) -> list[Appends]:
        """What the stores of this process have counted."""
        tallies = [] if self._ground is None else [self._ground.store.tally]
        if (blocking := self.blocking.made_store) is not None:
            tallies.append(blocking.tally)
        return [tally.read() for tally in tallies]

    async def run(
        self, *consumers: str, relay: bool = False, sagas: bool | None = None, health_port: int | None = None
    ) -> None:
        """Run consumers (all of them, and the sagas, when none is named) until SIGTERM or SIGINT, then drain.

        ``relay`` also runs an outbox relay in this process; most run ``somastack relay`` beside it instead.
        ``sagas`` says whether sagas run here, whichever consumers are named.
        ``health_port`` serves health and metrics there; without it ``config.health_port`` says whether and where.
        """
        send_spans(self.config)
        async with self:
            services = self.services(*consumers, relay=relay, sagas=sagas)
            port = self.config.health_port if health_port is None else health_port
            await run_until_signalled(self.probes(*services, port=port), *services)

    def services(self, *consumers: str, relay: bool = False, sagas: bool | None = None) -> list[Service]:
        """What :meth:`run` runs, not started yet: for processes that run several applications.

        Raises:
            ConfigurationError: there is nothing to run, or no consumer of that name.
        """
        for stranger in self._routes.strangers(self._handlers):
            log.warning("reads names consumer %s, which has no handler here: is that its name?", stranger)
        services: list[Service] = [self.consumer(name) for name in consumers or self.consumers]
        if sagas or (sagas is None and self._sagas and not consumers):
            services.append(self.saga_worker())
        if relay and self.config.uses_kafka:
            services.insert(0, self.relay())
        if not services:
            raise ConfigurationError("Nothing to run.", cure="declare a handler, or run `somastack relay`.")
        return services

    async def drain(self, *consumers: str, patience: float = 60.0) -> None:
        """Run consumers of the log until they have seen every event recorded before this call, and tried the letters
        that are due. For scripts and tests.

        Raises:
            ConfigurationError: events come through Kafka in this mode.
            HandlerFailed: events failed and are dead letters now.
            TimeoutError: it took longer than ``patience`` seconds.
        """
        workers = [self.consumer(name) for name in consumers or self.consumers]
        target = (await self.store.ticks.latest()).tick_id
        async with asyncio.timeout(patience):
            for worker in workers:
                async with worker:
                    await self._open_ground.caught_up(worker, target)

    async def open(self) -> Self:
        """Connect (in standalone: start the embedded database and bring it up to date). May be nested."""
        async with self._opening:
            if self._ground is None:
                self._ground = await open_ground(self.config, self.models, self._routes.of)
                if self.config.uses_kafka:
                    await ensure_topics(self.config, self._routes.needed, mirrors=self._settings.mirrors)
                opened(self)
            self._users += 1
        return self

    async def close(self) -> None:
        """Give everything back when the last user leaves."""
        async with self._opening:
            self._users = max(0, self._users - 1)
            if self._users == 0 and self._ground is not None:
                ground, self._ground = self._ground, None
                if self._orchestrator is not None:
                    await self._orchestrator.close()
                    self._orchestrator = None
                closed(self)
                self.blocking.close()
                await ground.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def _open_ground(self) -> Ground:
        if self._ground is None:
            raise ConfigurationError("The application is not open.", cure="use `async with soma:` around it.")
        return self._ground

    def _typed(self, event: RecordedEvent) -> RecordedEvent:
        return typed(event, self.models, self.upcasters)


def _append(store: EventStore) -> Callable[[Any, Any], Any]:
    async def append(events: Any, tx: Any) -> Published:
        return await store.publish(events, tx=tx)

    return append
