"""The catalogue of the reference environment agrees with the files it names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.apicurio import ApicurioServer
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.plugin import pytest_report_header

_FOLDER = deployments_folder()
_SERVICES: dict[str, Any] = yaml.safe_load((_FOLDER / "services.yaml").read_text())["services"]
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds


def _properties(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


@pytest.mark.parametrize("name", sorted(_SERVICES))
def test_every_service_is_complete_and_its_files_exist(name: str) -> None:
    service = _SERVICES[name]
    needed = {"version", "image", "coordinates", "config", "ports", "memory_mib", "probe", "profiles", "status"}
    assert needed <= service.keys()
    assert service["image"].endswith(f":{service['version']}")
    assert all((_FOLDER / path).is_file() for path in service["config"])
    assert service["probe"]["port"] in service["ports"]
    recipe = service["coordinates"].get("recipe")
    assert recipe is None or (_FOLDER / recipe / "pom.xml").is_file()


def test_no_two_services_share_a_port() -> None:
    counted = Counter(port for service in _SERVICES.values() for port in service["ports"].values())
    assert [port for port, times in counted.items() if times > 1] == []


def test_memory_fits_the_machine() -> None:
    assert sum(service["memory_mib"] for service in _SERVICES.values()) < 15 * 1024


@pytest.mark.parametrize(("name", "version"), [("kafka", KafkaServer.version), ("apicurio", ApicurioServer.version)])
def test_the_lane_runs_the_catalogue_s_versions(name: str, version: str) -> None:
    assert _SERVICES[name]["version"] == version
    pom = (_FOLDER / "local" / name / "pom.xml").read_text()
    assert f"<version>{version}</version>" in pom
    assert version in _SERVICES[name]["coordinates"]["maven"]


def test_kafka_listens_on_the_catalogue_s_ports() -> None:
    ports = _SERVICES["kafka"]["ports"]
    listeners = _properties(_FOLDER / "config" / "kafka" / "server.properties")["listeners"]
    assert {int(port) for port in re.findall(r":(\d+)", listeners)} == set(ports.values())


def test_postgres_listens_on_the_catalogue_s_port_and_is_durable() -> None:
    lines = (_FOLDER / "config" / "postgres" / "postgresql.conf").read_text()
    settings = dict(re.findall(r"^(\w+) = (\S+)", lines, re.MULTILINE))
    assert int(settings["port"]) == _SERVICES["postgres"]["ports"]["sql"]
    assert [settings[name] for name in ("fsync", "full_page_writes", "synchronous_commit")] == ["on", "on", "on"]


def test_topics_are_those_of_the_requirements() -> None:
    topics = yaml.safe_load((_FOLDER / "config" / "kafka" / "topics.yaml").read_text())["topics"]
    found = {topic["name"]: (topic["partitions"], topic["retention_ms"]) for topic in topics}
    assert found == {
        "soma.stack.txn.events": (6, _WEEK),
        "soma.stack.saga.commands": (6, _WEEK // 7),
        "soma.stack.saga.events": (6, _WEEK),
        "soma.stack.dlq": (3, 30 * _WEEK // 7),
        "soma.brain.cognitive.events": (3, _WEEK),
        "soma.agent.task.events": (6, _WEEK),
        "soma.memory.store.events": (3, _WEEK),
        "cdc.postgres.events": (3, -1),
    }
    assert [topic["name"] for topic in topics if topic["cleanup_policy"] == "compact"] == ["cdc.postgres.events"]


def test_the_header_says_where_every_service_comes_from(pytestconfig: pytest.Config) -> None:
    header = pytest_report_header(pytestconfig)
    assert all(word in header for word in ("postgres ", "postgres16 ", "kafka ", "registry "))
