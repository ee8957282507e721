"""Which backend gives a test its servers: external, docker, local, in this order, or the one that is forced.

A service that is asked for and cannot be had is an error of the test, never a reason to skip it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Protocol
from urllib.parse import urlsplit

from soma_common.errors import ConfigurationError, ServerUnavailable
from soma_common.testing.lane.kafka_wire import Topic, broker_count, create_topic
from soma_common.testing.lane.sql_tools import SqlTools

FORCE = "SOMA_TEST_BACKEND"


class Service(StrEnum):
    """What a test can ask for."""

    POSTGRES = "postgres"
    POSTGRES16 = "postgres16"
    KAFKA = "kafka"
    REGISTRY = "registry"


class Backend(StrEnum):
    """Where a service comes from."""

    EXTERNAL = "external"
    DOCKER = "docker"
    LOCAL = "local"


ADDRESSES = {
    Service.POSTGRES: "SOMA_TEST_POSTGRES_DSN",
    Service.POSTGRES16: "SOMA_TEST_POSTGRES16_DSN",
    Service.KAFKA: "SOMA_TEST_KAFKA_BOOTSTRAP",
    Service.REGISTRY: "SOMA_TEST_REGISTRY_URL",
}


class PostgresHandle(Protocol):
    """What every backend's PostgreSQL offers."""

    @property
    def dsn(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def sql(self) -> SqlTools: ...


class KafkaHandle(Protocol):
    """What every backend's Kafka offers."""

    @property
    def bootstrap(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def address(self) -> str: ...
    def create_topic(self, topic: Topic) -> None: ...


class RegistryHandle(Protocol):
    """What every backend's schema registry offers."""

    @property
    def url(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def address(self) -> str: ...


@cache
def docker_answers() -> bool:
    """True when Testcontainers is installed and a container engine answers."""
    docker = shutil.which("docker")
    if docker is None or importlib.util.find_spec("testcontainers") is None:
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def choose(
    service: Service,
    env: Mapping[str, str],
    *,
    engine: Callable[[], bool] = docker_answers,
) -> Backend:
    """The backend for a service. Raises ConfigurationError for an unknown or impossible forced choice."""
    forced = env.get(FORCE, "auto").strip().lower() or "auto"
    if forced == "auto":
        return _first(service, env, engine)
    if forced not in set(Backend):
        raise ConfigurationError(f"{FORCE}={forced} is unknown.", cure="use auto, external, docker or local.")
    backend = Backend(forced)
    _require(backend, service, env, engine)
    return backend


def _first(service: Service, env: Mapping[str, str], engine: Callable[[], bool]) -> Backend:
    if env.get(ADDRESSES[service]):
        return Backend.EXTERNAL
    return Backend.DOCKER if engine() else Backend.LOCAL


def _require(
    backend: Backend,
    service: Service,
    env: Mapping[str, str],
    engine: Callable[[], bool],
) -> None:
    if backend is Backend.EXTERNAL and not env.get(ADDRESSES[service]):
        raise ConfigurationError(
            f"{FORCE}=external, but there is no address for {service}.",
            cure=f"set {ADDRESSES[service]}.",
        )
    if backend is Backend.DOCKER and not engine():
        raise ConfigurationError(
            f"{FORCE}=docker, but no container engine answers or Testcontainers is not installed.",
            cure="start the engine and `pip install testcontainers`, or use SOMA_TEST_BACKEND=local.",
        )


@dataclass(frozen=True, slots=True)
class ExternalPostgres:
    """A PostgreSQL server somebody else runs; its user must be allowed to create databases."""

    dsn: str

    @property
    def sql(self) -> SqlTools:
        return SqlTools.at(self.dsn)

    @property
    def version(self) -> str:
        return self.sql.query("SHOW server_version").split()[0]

    @property
    def address(self) -> str:
        parts = urlsplit(self.dsn)
        return f"{parts.hostname or 'socket'}:{parts.port or 5432}"


@dataclass(frozen=True, slots=True)
class ExternalKafka:
    """A Kafka cluster somebody else runs. Raises ServerUnavailable when made and nothing answers."""

    bootstrap: str
    version: str = "external"

    def __post_init__(self) -> None:
        try:
            broker_count(self.bootstrap)
        except (OSError, ValueError) as error:
            raise ServerUnavailable(
                f"No Kafka broker answers at {self.bootstrap}: {error}.",
                cure=f"check {ADDRESSES[Service.KAFKA]}.",
            ) from error

    @property
    def address(self) -> str:
        return self.bootstrap

    def create_topic(self, topic: Topic) -> None:
        create_topic(self.bootstrap, topic)


@dataclass(frozen=True, slots=True)
class ExternalRegistry:
    """A schema registry somebody else runs."""

    url: str

    @property
    def version(self) -> str:
        """What the registry says of itself. Raises ServerUnavailable when nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url.rstrip('/')}/apis/registry/v3/system/info", timeout=10) as answer:
                return str(json.load(answer)["version"])
        except (OSError, ValueError, KeyError) as error:
            raise ServerUnavailable(
                f"No schema registry answers at {self.url}: {error}.", cure=f"check {ADDRESSES[Service.REGISTRY]}."
            ) from error

    @property
    def address(self) -> str:
        return urlsplit(self.url).netloc
