"""The plugin's fixtures on real servers."""

from __future__ import annotations

from collections.abc import Callable

import aiokafka
import httpx

from soma_common.testing.backends import KafkaHandle, PostgresHandle, RegistryHandle
from soma_common.testing.lane.sql_tools import SqlTools


def test_postgres_18_and_16(soma_postgres: PostgresHandle, soma_postgres16: PostgresHandle) -> None:
    assert soma_postgres.version.startswith("18.")
    assert soma_postgres16.version.startswith("16.")
    assert soma_postgres.sql.query("SHOW wal_level") == "logical"
    assert soma_postgres16.sql.query("SELECT current_setting('fsync')") == "on"


def test_each_test_has_its_own_database(soma_database: str, soma_database16: str) -> None:
    for dsn in (soma_database, soma_database16):
        sql = SqlTools.at(dsn)
        assert sql.query("SELECT current_database() LIKE 'soma_test_%'") == "t"
        sql.query("CREATE TABLE left_over (i int)")
        assert sql.query("SELECT count(*) FROM left_over") == "0"


def test_the_next_test_sees_nothing_of_it(soma_database: str) -> None:
    assert SqlTools.at(soma_database).query("SELECT to_regclass('left_over') IS NULL") == "t"


async def _round_trip(bootstrap: str, topic: str) -> bytes | None:
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap, compression_type="snappy") as producer:
        await producer.send_and_wait(topic, b"hello")
    async with aiokafka.AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest") as consumer:
        return (await consumer.getone()).value


async def test_kafka_carries_a_record(soma_kafka: KafkaHandle, soma_topic: Callable[..., str]) -> None:
    first, second = (
        soma_topic("soma.test.a", partitions=1),
        soma_topic("soma.test.a", cleanup_policy="compact"),
    )
    assert first != second
    assert await _round_trip(soma_kafka.bootstrap, first) == b"hello"


def test_registry_has_the_backward_rule(soma_registry: RegistryHandle) -> None:
    rule = httpx.get(f"{soma_registry.url}/apis/registry/v3/admin/rules/COMPATIBILITY")
    assert rule.status_code == 200
    info = httpx.get(f"{soma_registry.url}/apis/registry/v3/system/info").json()
    assert info["version"] == soma_registry.version
