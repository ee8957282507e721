"""The docker backend: Testcontainers, thin. UNPROVEN wherever no container engine runs, its authors' machine included.

The images, by tag, come from ``deployments/services.yaml`` and are configured by the same files as the local lane.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soma_common.errors import ServerUnavailable
from soma_common.testing.backends import (
    ExternalKafka,
    ExternalPostgres,
    ExternalRegistry,
)
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.apicurio import environment
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.ports import LOOPBACK, free_port

_PATIENCE = 180.0  # seconds: the first start pulls the image


def _image(service: str) -> str:
    yaml = importlib.import_module("yaml")
    catalogue = yaml.safe_load((deployments_folder() / "services.yaml").read_text())
    return str(catalogue["services"][service]["image"])


def _container(image: str) -> Any:
    return importlib.import_module("testcontainers.core.container").DockerContainer(image)


def start_postgres(major: int = 18) -> tuple[ExternalPostgres, Callable[[], None]]:
    """A PostgreSQL container and the function that ends it."""
    image = _image("postgres") if major == 18 else f"postgres:{major}"
    password = secrets.token_urlsafe(18)
    config = deployments_folder() / "config" / "postgres" / "postgresql.conf"
    container = (
        _container(image)
        .with_exposed_ports(5432)
        .with_env("POSTGRES_PASSWORD", password)
        .with_volume_mapping(str(config), "/etc/postgresql/postgresql.conf", "ro")
        .with_command("postgres -c config_file=/etc/postgresql/postgresql.conf")
    )
    container.start()
    where = f"{container.get_container_host_ip()}:{container.get_exposed_port(5432)}"
    handle = ExternalPostgres(f"postgresql://postgres:{password}@{where}/postgres")
    _await(handle.sql.answers, image, container.stop)
    return handle, container.stop


def start_kafka() -> tuple[ExternalKafka, Callable[[], None]]:
    """A Kafka container and the function that ends it."""
    image, port = _image("kafka"), free_port()
    folder = scratch_folder("kafka-config")
    shared = (deployments_folder() / "config" / "kafka" / "server.properties").read_text()
    listeners = f"listeners=INTERNAL://:{port},CONTROLLER://:9093\nadvertised.listeners=INTERNAL://{LOOPBACK}:{port}\n"
    (folder / "server.properties").write_text(f"{shared}\n{listeners}")
    container = _container(image).with_bind_ports(port, port)
    container.with_volume_mapping(str(folder), "/mnt/shared/config", "ro").start()
    bootstrap = f"{LOOPBACK}:{port}"
    _await(lambda: _answers(lambda: ExternalKafka(bootstrap)), image, container.stop)
    return ExternalKafka(bootstrap), container.stop


def start_registry(dsn: str) -> tuple[ExternalRegistry, Callable[[], None]]:
    """An Apicurio container on the database ``dsn`` and the function that ends it.

    It uses the host's network (Linux only), because the database's address is the host's.
    """
    image, http = _image("apicurio"), free_port()
    inside = Path("/config/application.properties")
    config = deployments_folder() / "config" / "apicurio" / "application.properties"
    container = _container(image).with_kwargs(network_mode="host").with_volume_mapping(str(config), str(inside), "ro")
    for key, value in environment(dsn, http=http, management=free_port(), config=inside).items():
        container.with_env(key, value)
    container.start()
    handle = ExternalRegistry(f"http://{LOOPBACK}:{http}")
    _await(lambda: _answers(lambda: handle.version), image, container.stop)
    return handle, container.stop


def _answers(question: Callable[[], object]) -> bool:
    try:
        question()
    except ServerUnavailable:
        return False
    return True


def _await(ready: Callable[[], bool], image: str, stop: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            stop()
            raise ServerUnavailable(f"The container {image} was not ready within {_PATIENCE:g} s.")
        time.sleep(0.1)
