"""Faults of a real Kafka and a real registry: doctor names each; and the whole stack as ``up`` starts it."""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from soma_common.config import KafkaSecurity
from soma_common.kafka.inspecting import inspect
from soma_common.testing.backends import KafkaHandle, RegistryHandle
from tests.cli_support import begun, somastack, stack, told
from tests.debian_program import debian_folder


def findings(area: str, topic: str, kafka: KafkaHandle, **env: str) -> dict[str, tuple[str, str, str]]:
    over = {
        "SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": "postgresql://127.0.0.1:9/d",
        "SOMASTACK_KAFKA_BOOTSTRAP": kafka.bootstrap, "SOMA_TOPIC": topic,
    }  # fmt: skip
    done = somastack("doctor", "--json", "--only", area, **(over | env))
    return {each["check"]: (each["level"], each["text"], each["cure"] or "") for each in told(done)["findings"]}


def test_a_topic_in_order(soma_kafka: KafkaHandle, soma_topic: Callable[..., str]) -> None:
    found = findings("kafka", soma_topic(), soma_kafka)
    assert {check: level for check, (level, *_) in found.items()} == dict.fromkeys(
        ("reachable", "topic", "copies", "message size", "controller clock"), "ok"
    )
    assert "6 partitions" in found["topic"][1]


def test_a_topic_that_is_not_there(soma_kafka: KafkaHandle) -> None:
    name = f"soma.none.{uuid4().hex[:8]}"
    level, text, _ = findings("kafka", name, soma_kafka)["topic"]
    assert (level, name in text) == ("fail", True)
    assert findings("kafka", name, soma_kafka)["topic"][0] == "fail"  # to look at it does not make it


@pytest.mark.parametrize(
    ("partitions", "config", "check", "level", "word"),
    [
        (1, {}, "topic", "warn", "somastack topics accept"),
        (6, {"min_insync_replicas": "2"}, "copies", "fail", "min.insync.replicas"),
        (6, {"max_message_bytes": "100000"}, "message size", "fail", "max.message.bytes=1048588"),
    ],
)
def test_topics_that_do_not_do(
    partitions: int, config: dict[str, str], check: str, level: str, word: str, soma_kafka: KafkaHandle,
    soma_topic: Callable[..., str],
) -> None:  # fmt: skip
    found = findings("kafka", soma_topic(partitions=partitions, **config), soma_kafka)[check]
    assert (found[0], word in found[2]) == (level, True), found


@pytest.mark.parametrize(("offset", "level"), [("+1h", "warn"), ("-10s", "warn"), ("+0.1s", "ok")])
def test_the_clock_of_kafka_differs(
    offset: str, level: str, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]
) -> None:
    library = next(debian_folder("libfaketime").rglob("libfaketime.so.1"))
    moved = {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    found = findings("kafka", soma_topic(), soma_kafka, **moved)["controller clock"]
    assert found[0] == level, found


async def test_the_clock_is_told_to_the_millisecond(soma_kafka: KafkaHandle) -> None:
    facts = await inspect(soma_kafka.bootstrap, KafkaSecurity(), [])
    assert facts.ahead is not None
    assert abs(facts.ahead.total_seconds()) < 0.2 + facts.give.total_seconds()  # it is this machine's


@pytest.mark.parametrize(("rule", "level"), [("NONE", "warn"), ("BACKWARD", "ok"), ("FULL_TRANSITIVE", "ok")])
def test_the_rule_of_the_registry(
    rule: str, level: str, soma_registry: RegistryHandle, soma_kafka: KafkaHandle
) -> None:
    group = f"g{uuid4().hex[:8]}"
    _registry(soma_registry, "POST", "groups", {"groupId": group})
    _registry(soma_registry, "POST", f"groups/{group}/rules", {"ruleType": "COMPATIBILITY", "config": rule})
    found = findings("registry", "t", soma_kafka, SOMA_SERVICE_ID=group, SOMASTACK_REGISTRY_URL=soma_registry.url)
    assert found["reachable"][0] == "ok"
    assert found["compatibility"][0] == level, found


def _registry(registry: RegistryHandle, method: str, path: str, body: object) -> None:
    request = urllib.request.Request(
        f"{registry.url}/apis/registry/v3/{path}", method=method, data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    urllib.request.urlopen(request, timeout=30).close()


@pytest.mark.timeout(600)
def test_the_whole_stack(tmp_path: Path) -> None:
    folder = Path(f"/tmp/soma-cli-{uuid4().hex[:8]}")
    here = {"SOMA_FOLDER": str(folder)}
    try:
        with stack(folder, "--mode", "somastack") as env:
            assert set(env) == {
                "SOMA_DEPLOY_MODE", "SOMA_FOLDER", "SOMASTACK_POSTGRES_DSN", "SOMASTACK_KAFKA_BOOTSTRAP", "SOMASTACK_REGISTRY_URL",
            }  # fmt: skip
            state = told(somastack("status", "--json", **here))
            assert state["up"], state
            assert {row["name"]: row["version"] for row in state["components"]}["kafka"] == "4.3.1"
            assert {row["name"] for row in state["components"]} >= {"postgres", "migrations", "kafka", "registry"}
            levels = {each["check"]: each["level"] for each in told(somastack("doctor", "--json", **here))["findings"]}
            assert levels.pop("topic") == "fail"  # no application has made it yet
            assert "fail" not in levels.values()
            assert levels["compatibility"] == "ok"  # its configuration says BACKWARD
            asyncio.run(_publish(env))
            found = told(somastack("doctor", "--json", "--only", "kafka", "--only", "work", "--old", "0", **here))
            assert {each["check"]: each["level"] for each in found["findings"]}["relay"] == "fail"
            assert somastack("up", "--mode", "somastack", **here).stderr.count("runs already") == 3
            assert "started" in somastack("logs", "kafka", "--lines", "10000", **here).stdout
            assert somastack("down", **here).stdout == "registry: ended\nkafka: ended\npostgres: ended\n"
            again = somastack("up", "--mode", "somastack", "--json", **here)
            assert told(again)["env"] == env  # the same ports and data
            assert "database: up to date" in again.stderr
            topics = asyncio.run(
                inspect(env["SOMASTACK_KAFKA_BOOTSTRAP"], KafkaSecurity(), ["soma.shop.events"])
            ).topics
            assert topics["soma.shop.events"] is not None
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("told_last", ["postgres:", "database:"], ids=["as the database is made", "as Kafka is made"])
def test_a_start_of_the_stack_that_was_killed(told_last: str) -> None:
    folder = Path(f"/tmp/soma-cli-{uuid4().hex[:8]}")
    here, arguments = {"SOMA_FOLDER": str(folder)}, ("up", "--mode", "somastack", "--only", "kafka,postgres")
    try:
        up = begun(*arguments, **here)
        assert up.stdout is not None
        while not up.stdout.readline().startswith(told_last):
            assert up.poll() is None
        time.sleep(0.5)
        up.kill()
        up.communicate()
        again = somastack(*arguments, **here)
        assert again.returncode == 0, again.stderr
        env = dict(line.removeprefix("export ").split("=", 1) for line in again.stdout.splitlines())
        asyncio.run(_publish(env))
        assert somastack("down", "--volumes", "--yes", **here).returncode == 0
    finally:
        somastack("down", "--volumes", "--yes", **here)
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


async def _publish(env: dict[str, str]) -> None:
    from soma_common import Event, Soma

    async with Soma.from_env(service_id="shop", env=env | {"HOME": os.environ.get("HOME", "/")}) as soma:
        await soma.publish(Event(event_type="order.placed", payload={}, tenant_id="acme", aggregate_id="o-1"))
