"""``somastack db``: upgrade, status and repair as an operator runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from uuid import uuid4

from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings
from soma_common.outbox.relay import identities
from soma_common.testing.backends import KafkaHandle, PostgresHandle


def somastack(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOMA")}
    command = [sys.executable, "-m", "soma_common.cli.main", *arguments]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=120, check=False)


def test_upgrade_twice_and_status(soma_postgres: PostgresHandle) -> None:
    name = f"soma_cli_{uuid4().hex[:12]}"
    env = {
        "SOMA_DEPLOY_MODE": "somastack",
        "SOMASTACK_POSTGRES_DSN": soma_postgres.sql.create_database(name),
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9",
    }
    try:
        missing = somastack("db", "status", **env)
        assert (missing.returncode, "missing" in missing.stdout) == (1, True)
        assert "applied 0001_event_log" in somastack("db", "upgrade", **env).stdout
        assert somastack("db", "upgrade", **env).stdout == "up to date\n"
        assert somastack("db", "status", **env).returncode == 0
    finally:
        soma_postgres.sql.drop_database(name)


async def test_repair_forgets_the_cursors_of_an_exactly_once_relay(soma_database: str, soma_kafka: KafkaHandle) -> None:
    service = f"shop-{uuid4().hex[:12]}"
    publishers = KafkaPublishers(PublisherSettings(bootstrap=soma_kafka.bootstrap))
    first = await publishers.open(identities(service)[0])
    await first.commit("7.1/-/0")
    await first.close()
    done = somastack(
        "db", "repair", "--yes",
        SOMA_DEPLOY_MODE="somastack", SOMA_SERVICE_ID=service, SOMA_EXACTLY_ONCE="true",
        SOMASTACK_POSTGRES_DSN=soma_database, SOMASTACK_KAFKA_BOOTSTRAP=soma_kafka.bootstrap,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the cursors of relay {service} in Kafka are forgotten" in done.stdout
    again = await publishers.open(identities(service)[0])
    assert again.stored is None
    await again.close()
    await publishers.close()


def test_an_unreachable_database_is_one_line_with_a_cure() -> None:
    done = somastack(
        "db", "status",
        SOMA_DEPLOY_MODE="somastack",
        SOMASTACK_POSTGRES_DSN="postgresql://u:secret@127.0.0.1:9/x", SOMASTACK_KAFKA_BOOTSTRAP="127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Error: The connection to PostgreSQL failed" in done.stderr
    assert "Cure:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_an_unknown_mode_is_one_line_with_a_cure() -> None:
    done = somastack("db", "status", SOMA_DEPLOY_MODE="moon")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Unknown deployment mode 'moon'.\nCure:")
