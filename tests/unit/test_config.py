"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from soma_common.config import SomaConfig
from soma_common.deployment import DeployMode
from soma_common.errors import ConfigurationError

STACK = {
    "SOMA_DEPLOY_MODE": "somastack",
    "SOMASTACK_POSTGRES_DSN": "postgresql://u:secret@db:5432/soma",
    "SOMASTACK_KAFKA_BOOTSTRAP": "k1:9092, kafka://k2:9092,[::1]:9092",
}


def test_standalone_needs_nothing() -> None:
    config = SomaConfig.from_env({})
    assert config.mode is DeployMode.STANDALONE
    assert (config.postgres_dsn, config.kafka_bootstrap, config.registry_url) == ("", "", "")
    assert config.topic == "soma.service.events"
    assert not config.uses_kafka
    assert not config.exactly_once


def test_somastack() -> None:
    given = STACK | {
        "SOMASTACK_REGISTRY_URL": "http://apicurio:8085/",
        "SOMA_SERVICE_ID": "brain",
        "SOMA_POOL_SIZE": "3",
        "SOMA_EXACTLY_ONCE": "TRUE",
        "SOMASTACK_POSTGRES_POOLER": "Transaction",
    }
    config = SomaConfig.from_env(given)
    assert config.uses_kafka
    assert config.kafka_bootstrap == "k1:9092,k2:9092,[::1]:9092"
    assert config.registry_url == "http://apicurio:8085"
    assert (config.topic, config.pool_size, config.exactly_once) == ("soma.brain.events", 3, True)
    assert config.postgres_pooler
    assert SomaConfig.from_env(given, service_id="other").service_id == "other"


def test_secrets_come_from_files_and_are_not_shown(tmp_path: Path) -> None:
    dsn, password = tmp_path / "dsn", tmp_path / "password"
    dsn.write_text("postgresql://u:hidden@db/soma\n")
    password.write_text("hidden\n")
    given = {**STACK, "SOMASTACK_POSTGRES_DSN_FILE": str(dsn), "SOMASTACK_KAFKA_PASSWORD_FILE": str(password)}
    config = SomaConfig.from_env(given)
    assert config.postgres_dsn == "postgresql://u:hidden@db/soma"
    assert config.kafka_security.password == "hidden"
    assert "hidden" not in repr(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SOMASTACK_POSTGRES_DSN": ""}, "SOMASTACK_POSTGRES_DSN is missing in mode somastack"),
        ({"SOMASTACK_POSTGRES_DSN": "mysql://db"}, "not a PostgreSQL address"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://[db/soma"}, "not a PostgreSQL address"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://u:secret@db:port/soma"}, "not a PostgreSQL address"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://u:secret@a:1,b:x/soma"}, "not a PostgreSQL address"),
        ({"SOMASTACK_POSTGRES_DSN_FILE": "/no/such/file"}, "cannot be read"),
        ({"SOMASTACK_KAFKA_BOOTSTRAP": ""}, "SOMASTACK_KAFKA_BOOTSTRAP is missing"),
        ({"SOMASTACK_KAFKA_BOOTSTRAP": " , "}, "SOMASTACK_KAFKA_BOOTSTRAP is missing"),
        ({"SOMASTACK_KAFKA_BOOTSTRAP": "kafka"}, "has 'kafka'"),
        ({"SOMASTACK_KAFKA_BOOTSTRAP": "kafka:0"}, "has 'kafka:0'"),
        ({"SOMASTACK_KAFKA_BOOTSTRAP": "kafka:99999"}, "has 'kafka:99999'"),
        ({"SOMASTACK_REGISTRY_URL": "apicurio:8085"}, "not a web address"),
        ({"SOMASTACK_REGISTRY_URL": "http://[apicurio"}, "not a web address"),
        ({"SOMASTACK_REGISTRY_URL": "http://"}, "not a web address"),
        ({"SOMA_TOPIC": ""}, "SOMA_TOPIC: '' is no name of a topic"),
        ({"SOMA_TOPIC": "my topic"}, "SOMA_TOPIC: 'my topic' is no name"),
        ({"SOMA_TOPIC": ".."}, "is no name"),
        ({"SOMA_TOPIC": "t" * 250}, "is no name"),
        ({"SOMA_INSTANCE": "no name"}, "SOMA_INSTANCE is 'no name'"),
        ({"SOMA_FOLDER": ""}, "SOMA_FOLDER is empty"),
        ({"SOMA_FOLDER": "~nobody-of-this-name/x"}, "SOMA_FOLDER"),
        ({"SOMA_SERVICE_ID": "Bad Name"}, "not a service name"),
        ({"SOMA_SERVICE_ID": "name\n"}, "not a service name"),
        ({"SOMA_POOL_SIZE": "0"}, "whole number from 1 to 1000"),
        ({"SOMA_POOL_SIZE": "1001"}, "whole number"),
        ({"SOMA_POOL_SIZE": "²"}, "whole number"),
        ({"SOMA_POOL_SIZE": "9" * 50}, "whole number"),
        ({"SOMA_EXACTLY_ONCE": "maybe"}, "use one of: false, true"),
        ({"SOMASTACK_KAFKA_PROTOCOL": "TLS"}, "SASL_SSL"),
        ({"SOMASTACK_POSTGRES_POOLER": "session"}, "none, transaction"),
        ({"SOMA_DEPLOY_MODE": "cloud"}, "Unknown deployment mode"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        SomaConfig.from_env(STACK | changes)
    assert caught.value.cure
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "dsn",
    ["postgresql:///soma?host=/run/postgresql", "postgres://u:p@a:5432,b:5433/soma", "postgresql://u@[::1]:5432/soma"],
)
def test_what_postgresql_takes_for_an_address_is_taken(dsn: str) -> None:
    assert SomaConfig.from_env(STACK | {"SOMASTACK_POSTGRES_DSN": dsn}).postgres_dsn == dsn
