"""pytest fixtures with real servers; loaded by pytest through the entry point ``soma_common``.

``soma_database`` is a fresh, migrated database per test; ``soma_topic`` makes topics with unique names;
``soma_postgres``, ``soma_postgres16``, ``soma_kafka`` and ``soma_registry`` are the servers, shared by the whole run.
Tests that stop or kill a server start one of their own (``soma_common.testing.lane``) instead.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from soma_common.errors import SomaError
from soma_common.testing.backends import (
    KafkaHandle,
    PostgresHandle,
    RegistryHandle,
    Service,
    choose,
)
from soma_common.testing.lane.kafka_wire import Topic

if TYPE_CHECKING:
    from soma_common.testing.run import ServerRun

_RUN = pytest.StashKey["ServerRun"]()
_SHARED = pytest.StashKey[str]()
_SEEN = pytest.StashKey[set[str]]()
_OUTPUT = "soma_servers"
_LOG_LINES = 20


def _run_of(config: pytest.Config) -> ServerRun:
    # Imported when a server is asked for: pytest loads this plugin in every run, the extra may not be installed.
    from soma_common.testing.run import ServerRun

    if _RUN not in config.stash:
        config.stash[_RUN] = ServerRun(os.environ, shared=os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    return config.stash[_RUN]


def _seen(config: pytest.Config) -> AbstractContextManager[None]:
    """Let the progress of a first download through pytest's capturing."""
    manager = config.pluginmanager.getplugin("capturemanager")
    return manager.global_and_fixture_disabled() if manager is not None else nullcontext()


@pytest.fixture(scope="session")
def soma_postgres(pytestconfig: pytest.Config) -> PostgresHandle:
    """PostgreSQL 18, shared by the run: ``.dsn``, ``.version``, ``.address``, ``.sql``."""
    with _seen(pytestconfig):
        return _run_of(pytestconfig).postgres()


@pytest.fixture(scope="session")
def soma_postgres16(pytestconfig: pytest.Config) -> PostgresHandle:
    """PostgreSQL 16, shared by the run."""
    with _seen(pytestconfig):
        return _run_of(pytestconfig).postgres(Service.POSTGRES16)


@pytest.fixture(scope="session")
def soma_kafka(pytestconfig: pytest.Config) -> KafkaHandle:
    """Kafka, shared by the run: ``.bootstrap``, ``.create_topic``."""
    with _seen(pytestconfig):
        return _run_of(pytestconfig).kafka()


@pytest.fixture(scope="session")
def soma_registry(pytestconfig: pytest.Config) -> RegistryHandle:
    """Apicurio Registry, shared by the run: ``.url``."""
    with _seen(pytestconfig):
        return _run_of(pytestconfig).registry()


@pytest.fixture
def soma_database(soma_postgres: PostgresHandle, pytestconfig: pytest.Config) -> Iterator[str]:
    """The DSN of a fresh database with all migrations applied, dropped after the test."""
    yield from _fresh_database(soma_postgres, pytestconfig)


@pytest.fixture
def soma_database16(soma_postgres16: PostgresHandle, pytestconfig: pytest.Config) -> Iterator[str]:
    """``soma_database`` on PostgreSQL 16."""
    yield from _fresh_database(soma_postgres16, pytestconfig)


def _fresh_database(server: PostgresHandle, config: pytest.Config) -> Iterator[str]:
    name = f"soma_test_{uuid.uuid4().hex[:16]}"
    yield server.sql.create_database(name, template=_run_of(config).template(server))
    server.sql.drop_database(name)


@pytest.fixture
def soma_topic(soma_kafka: KafkaHandle) -> Callable[..., str]:
    """``soma_topic(prefix="soma.test", partitions=6, **config)`` makes a topic and returns its unique name."""

    def make(prefix: str = "soma.test", *, partitions: int = 6, **config: str) -> str:
        name = f"{prefix}.{uuid.uuid4().hex[:12]}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        soma_kafka.create_topic(Topic(name, partitions=partitions, config=settings))
        return name

    return make


def pytest_report_header(config: pytest.Config) -> str:
    """Where each service will come from; nothing is started for it."""
    return "soma servers: " + ", ".join(f"{service} {_planned(service)}" for service in Service)


def _planned(service: Service) -> str:
    try:
        return choose(service, os.environ).value
    except SomaError as error:
        return f"unavailable ({error.message})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of the log of every server of the run."""
    report = yield
    if report.failed and _RUN in item.config.stash:
        for service, server in item.config.stash[_RUN].given.items():
            process = getattr(server, "process", None)  # servers that we did not start show no log
            if process is not None:
                report.sections.append((f"end of the log of {service}", process.log_tail(_LOG_LINES)))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Note what was used, then end it."""
    config = session.config
    if _RUN in config.stash:
        lines = {f"{service} {server.version} at {server.address}" for service, server in _given(config)}
        config.stash[_SEEN] = config.stash.get(_SEEN, set()) | lines
        config.stash[_RUN].close()
        output = getattr(config, "workeroutput", None)
        if output is not None:
            output[_OUTPUT] = sorted(lines)


def _given(
    config: pytest.Config,
) -> list[tuple[Service, PostgresHandle | KafkaHandle | RegistryHandle]]:
    return list(config.stash[_RUN].given.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect from a pytest-xdist worker what it used."""
    seen = node.config.stash.setdefault(_SEEN, set())
    seen.update(getattr(node, "workeroutput", {}).get(_OUTPUT, ()))
    node.config.stash[_SHARED] = node.workerinput["testrunuid"]


def pytest_unconfigure(config: pytest.Config) -> None:
    """After the last worker has left, see that the run's servers have ended and its folder is gone."""
    if _SHARED in config.stash:
        from soma_common.testing.run import sweep

        sweep(config.stash[_SHARED], os.environ)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The servers that were really used: version and address."""
    seen = config.stash.get(_SEEN, set())
    if seen:
        terminalreporter.write_line("soma servers used: " + "; ".join(sorted(seen)))
