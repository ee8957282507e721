"""The servers of one test run: started when first asked for, shared between the pytest-xdist workers of the run."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from soma_common.errors import ServerUnavailable
from soma_common.locks import exclusive
from soma_common.testing import docker
from soma_common.testing.backends import (
    ADDRESSES,
    Backend,
    ExternalKafka,
    ExternalPostgres,
    ExternalRegistry,
    KafkaHandle,
    PostgresHandle,
    RegistryHandle,
    Service,
    choose,
)
from soma_common.testing.lane.apicurio import ApicurioServer
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.lane.server import LaneServer

_PATIENCE = 1800.0  # seconds: another worker may be downloading jars over a slow line


_S = TypeVar("_S", bound=LaneServer[Any])
_H = TypeVar("_H")
_MAJORS = {Service.POSTGRES: 18, Service.POSTGRES16: 16}


class ServerRun:
    """Hands out each service once and ends what it started.

    ``shared`` names a run of several processes. ``lasting``: a Kafka of the lane starts slowly and is quick.
    """

    def __init__(self, env: Mapping[str, str], *, shared: str | None = None, lasting: bool = False) -> None:
        self._env = env
        self._shared, self._lasting = shared, lasting
        self._folder = _run_folder(shared)
        self._given: dict[Service, PostgresHandle | KafkaHandle | RegistryHandle] = {}
        self._prepared: set[str] = set()
        self._ends: list[Callable[[], None]] = []

    @property
    def given(self) -> Mapping[Service, PostgresHandle | KafkaHandle | RegistryHandle]:
        """What has been handed out so far."""
        return self._given

    def postgres(self, service: Service = Service.POSTGRES) -> PostgresHandle:
        """The run's PostgreSQL 18 (or 16). Raises ServerUnavailable, ConfigurationError or MissingDependency."""
        if service not in self._given:
            self._given[service] = self._new_postgres(service)
        return cast(PostgresHandle, self._given[service])

    def kafka(self) -> KafkaHandle:
        """The run's Kafka. Raises ServerUnavailable or ConfigurationError."""
        if Service.KAFKA not in self._given:
            self._given[Service.KAFKA] = self._new_kafka()
        return cast(KafkaHandle, self._given[Service.KAFKA])

    def registry(self) -> RegistryHandle:
        """The run's schema registry, on a database of its own. Raises ServerUnavailable or ConfigurationError."""
        if Service.REGISTRY not in self._given:
            self._given[Service.REGISTRY] = self._new_registry()
        return cast(RegistryHandle, self._given[Service.REGISTRY])

    def template(self, server: PostgresHandle) -> str:
        """The name of a database of ``server`` with all migrations applied, made once per run."""
        name = _name("template", self._folder)
        if server.address not in self._prepared:
            with exclusive(self._folder / "template.lock", within=_PATIENCE):
                if not server.sql.has_database(name):
                    _make_template(server, name)
            self._prepared.add(server.address)
            self._drop_later(server, name)
        return name

    def close(self) -> None:
        """End what this run started; in a shared run the last process to leave ends the servers."""
        for end in reversed(self._ends):
            end()
        self._ends.clear()
        self._given.clear()
        if self._shared is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _drop_later(self, server: PostgresHandle, name: str) -> None:
        """A server that outlives the run keeps nothing of it; of a shared run ``sweep`` sees to that."""
        if isinstance(server, ExternalPostgres) and self._shared is None:
            self._ends.append(lambda: server.sql.drop_database(name))

    def _new_postgres(self, service: Service) -> PostgresHandle:
        backend, major = choose(service, self._env), _MAJORS[service]
        if backend is Backend.EXTERNAL:
            return _answering(ExternalPostgres(self._env[ADDRESSES[service]]), ADDRESSES[service])
        if backend is Backend.DOCKER:
            return self._ended_later(docker.start_postgres(major))
        return self._share(
            service,
            lambda: PostgresServer.start(major, parent=self._folder),
            PostgresServer.attach,
        )

    def _new_kafka(self) -> KafkaHandle:
        backend = choose(Service.KAFKA, self._env)
        if backend is Backend.EXTERNAL:
            return ExternalKafka(self._env[ADDRESSES[Service.KAFKA]])
        if backend is Backend.DOCKER:
            return self._ended_later(docker.start_kafka())
        return self._share(
            Service.KAFKA,
            lambda: KafkaServer.start(parent=self._folder, lasting=self._lasting),
            KafkaServer.attach,
        )

    def _new_registry(self) -> RegistryHandle:
        backend = choose(Service.REGISTRY, self._env)
        if backend is Backend.EXTERNAL:
            return _known(ExternalRegistry(self._env[ADDRESSES[Service.REGISTRY]]))
        store = self.postgres()
        if backend is Backend.DOCKER:
            return self._ended_later(docker.start_registry(self._registry_database(store)))
        return self._share(Service.REGISTRY, lambda: self._start_registry(store), ApicurioServer.attach)

    def _start_registry(self, store: PostgresHandle) -> ApicurioServer:
        return ApicurioServer.start(self._registry_database(store), parent=self._folder)

    def _registry_database(self, store: PostgresHandle) -> str:
        name = _name("registry", self._folder)
        store.sql.drop_database(name)
        self._drop_later(store, name)
        return store.sql.create_database(name)

    def _share(self, service: Service, start: Callable[[], _S], attach: Callable[[Path], _S]) -> _S:
        """The server another process of the run has started, else a new one."""
        record = self._folder / f"{service}.where"
        with exclusive(self._folder / f"{service}.lock", within=_PATIENCE):
            server = _attached(record, attach) or start()
            record.write_text(str(server.process.folder))
        self._ends.append(server.process.release if self._shared else server.close)
        return server

    def _ended_later(self, started: tuple[_H, Callable[[], None]]) -> _H:
        handle, end = started
        self._ends.append(end)
        return handle


def _run_folder(shared: str | None) -> Path:
    if shared is None:
        return scratch_folder("run")
    folder = _shared_folder(shared)
    folder.mkdir(mode=0o711, exist_ok=True)
    return folder


def _shared_folder(shared: str) -> Path:
    return Path(tempfile.gettempdir()) / f"soma-run-{os.getuid()}-{shared}"


def sweep(shared: str, env: Mapping[str, str], *, within: float = 20.0) -> None:
    """Wait until the guards have ended the servers of a run that all its users have left; delete its folder."""
    folder = _shared_folder(shared)
    deadline = time.monotonic() + within
    while any(place.is_dir() for place in folder.glob("soma-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for service in _MAJORS:
        if choose(service, env) is Backend.EXTERNAL:
            for purpose in ("template", "registry"):
                ExternalPostgres(env[ADDRESSES[service]]).sql.drop_database(_name(purpose, folder))
    shutil.rmtree(folder, ignore_errors=True)


def _name(purpose: str, folder: Path) -> str:
    """A database name of this run only."""
    return f"soma_{purpose}_{folder.name.rsplit('-', 1)[-1].lower()}"


def _make_template(server: PostgresHandle, name: str) -> None:
    """Migrate a database under another name first: the template is there whole, or not at all."""
    fresh = f"{name}_new"
    server.sql.drop_database(fresh)
    apply_migrations(server.sql.create_database(fresh))
    server.sql.create_database(name, template=fresh)
    server.sql.drop_database(fresh)


def _attached(record: Path, attach: Callable[[Path], _S]) -> _S | None:
    """The recorded server, None when there is none or it is about to end because its last user has left."""
    if not record.exists():
        return None
    try:
        server = attach(Path(record.read_text()))
    except (OSError, TimeoutError):  # its folder is gone
        return None
    if server.process.alive:
        return server
    server.process.release()
    return None


def _answering(server: ExternalPostgres, variable: str) -> ExternalPostgres:
    if not server.sql.answers():
        raise ServerUnavailable(f"No PostgreSQL answers at {server.address}.", cure=f"check {variable}.")
    return server


def _known(registry: ExternalRegistry) -> ExternalRegistry:
    _ = registry.version  # asks it: one that is away must fail here, not in the middle of a test
    return registry


def apply_migrations(dsn: str) -> None:
    """Bring the database to the library's newest schema."""
    from soma_common.postgres.migrate import upgrade

    asyncio.run(upgrade(dsn))
