"""Doctor without servers: the environment, this machine, Kafka and the registry that are not there."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from soma_common.cli.checks.findings import Area, Finding, Level, Limits, Subject, exit_code
from soma_common.cli.checks.running import examine
from soma_common.cli.checks.settings import known_variables

STACK = {
    "SOMA_DEPLOY_MODE": "somastack",
    "SOMASTACK_POSTGRES_DSN": "postgresql://h/d",
    "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9",
}


def look(env: dict[str, str], *areas: Area, **limits: float) -> dict[str, Finding]:
    found = asyncio.run(examine(Subject(env, Limits(**limits)), areas))  # type: ignore[arg-type]  # whichever limits
    return {finding.check: finding for findings in found.values() for finding in findings}


def test_the_exit_code_is_that_of_the_worst() -> None:
    levels = [Level.OK, Level.SKIPPED, Level.WARN, Level.FAIL]
    codes = [exit_code([Finding("x", each, "") for each in levels[: number + 1]]) for number in range(4)]
    assert codes == [0, 0, 1, 2]
    assert exit_code([]) == 0


def test_settings_that_cannot_be_read_stop_what_rests_on_them() -> None:
    found = look({"SOMA_DEPLOY_MODE": "moon"}, *Area)
    assert found["settings"].level is Level.FAIL
    assert found["mode"].level is Level.FAIL
    assert found["python"].level is Level.OK
    assert found["reachable"].level is Level.SKIPPED
    assert exit_code(list(found.values())) == 2
    assert look({"SOMA_DEPLOY_MODE": "somastack"}, Area.SETTINGS)["settings"].cure is not None


@pytest.mark.parametrize(
    ("env", "check", "level", "word"),
    [
        ({"SOMA_DEPLOY_MODE": "FULL_LOCAL"}, "mode", Level.OK, "standalone"),
        ({"SA01_DEPLOYMENT_MODE": "TEST_CI"}, "mode", Level.OK, "standalone"),
        ({"SOMA_DEPLOY_MODE": "dev", "SA01_DEPLOYMENT_MODE": "PROD"}, "mode", Level.WARN, "PROD"),
        ({"SOMA_FOLDR": "x"}, "names", Level.WARN, "SOMA_FOLDER"),
        ({"SOMASTACK_KAFKA_BOOTSTRAPS": "x"}, "names", Level.WARN, "SOMASTACK_KAFKA_BOOTSTRAP"),
        ({"SOMASTACK_REDIS_URL": "x"}, "names", Level.OK, "misspelt"),
        ({"SOMA_LOG_LEVEL": "DEBUG", "SOMA_LOG_FORMAT": "json"}, "names", Level.OK, "misspelt"),
        ({"SOMA_LOG_LEVL": "DEBUG"}, "names", Level.WARN, "is SOMA_LOG_LEVEL meant"),
        ({"SOMA_ANYTHING_ELSE": "x"}, "names", Level.OK, "not for this library"),
    ],
)
def test_the_environment_is_understood_as_it_was_meant(
    env: dict[str, str], check: str, level: Level, word: str
) -> None:
    found = look(env, Area.SETTINGS)[check]
    assert (found.level, word in found.text) == (level, True), found


def test_variables_are_those_that_the_settings_ask_for() -> None:
    assert {
        "SOMA_FOLDER",
        "SOMASTACK_POSTGRES_DSN_FILE",
        "SOMASTACK_REGISTRY_URL",
        "SOMA_EXACTLY_ONCE",
    } <= known_variables()


def test_a_secret_that_everybody_may_read(tmp_path: Path) -> None:
    secret = tmp_path / "dsn"
    secret.write_text("postgresql://a:secret@h/d")
    env = {"SOMASTACK_POSTGRES_DSN_FILE": str(secret)}
    secret.chmod(0o644)
    found = look(env, Area.SETTINGS)["secrets"]
    assert (found.level, "chmod 600" in str(found.cure)) == (Level.WARN, True)
    secret.chmod(0o600)
    assert look(env, Area.SETTINGS)["secrets"].level is Level.OK


def test_a_folder_that_is_a_file_and_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert look({"SOMA_FOLDER": str(tmp_path / "file" / "x")}, Area.MACHINE)["folder"].level is Level.FAIL
    assert look({"SOMA_FOLDER": str(tmp_path / "new" / "x")}, Area.MACHINE)["folder"].level is Level.OK
    assert look({"SOMA_FOLDER": str(tmp_path)}, Area.MACHINE, free=2**60)["disk"].level is Level.WARN


def test_kafka_and_a_registry_that_do_not_answer() -> None:
    env = STACK | {"SOMASTACK_REGISTRY_URL": "http://127.0.0.1:9"}
    kafka = look(env, Area.KAFKA, within=1.0)["reachable"]
    assert (kafka.level, "SOMASTACK_KAFKA_BOOTSTRAP" in str(kafka.cure)) == (Level.FAIL, True)
    registry = look(env, Area.REGISTRY, within=1.0)["reachable"]
    assert (registry.level, "cannot be reached" in registry.text) == (Level.FAIL, True)


@pytest.mark.parametrize("area", [Area.DATABASE, Area.KAFKA, Area.REGISTRY])
def test_a_server_that_takes_connections_and_says_nothing_has_an_end(area: Area) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        env = {
            "SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": f"postgresql://{where}/d",
            "SOMASTACK_KAFKA_BOOTSTRAP": where, "SOMASTACK_REGISTRY_URL": f"http://{where}",
        }  # fmt: skip
        found = look(env, area, within=0.5)
        assert [each.level for each in found.values()] == [Level.FAIL]


def test_a_password_is_in_no_finding() -> None:
    env = STACK | {"SOMASTACK_POSTGRES_DSN": "postgresql://u:hush-hush@127.0.0.1:9/d", "SOMASTACK_KAFKA_PASSWORD": "hush-hush",
                   "SOMASTACK_KAFKA_PROTOCOL": "SASL_PLAINTEXT", "SOMASTACK_KAFKA_USERNAME": "u"}  # fmt: skip
    assert "hush-hush" not in repr(look(env, *Area, within=1.0))
