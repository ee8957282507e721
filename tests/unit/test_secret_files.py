"""Every secret may come from a file, and a file that has none is an error: without a secret some doors stand open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest

from soma_common.cli.checks.findings import Level, Limits, Subject
from soma_common.cli.checks.settings import look, secret_files
from soma_common.config import KafkaSecurity, SomaConfig, secret_of
from soma_common.console.settings import ConsoleSettings
from soma_common.errors import ConfigurationError

STACK: Final = {"SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": "postgresql://h/d",
                "SOMASTACK_KAFKA_BOOTSTRAP": "h:1"}  # fmt: skip
SECRETS: Final = {
    ("SomaConfig", "postgres_dsn"): ("SOMASTACK_POSTGRES_DSN", "postgresql://u:hush-hush-hush-hush-1@h/d"),
    ("SomaConfig", "registry_token"): ("SOMASTACK_REGISTRY_TOKEN", "hush-hush-hush-hush-2"),
    ("KafkaSecurity", "password"): ("SOMASTACK_KAFKA_PASSWORD", "hush-hush-hush-hush-3"),
    ("ConsoleSettings", "token"): ("SOMA_CONSOLE_TOKEN", "hush-hush-hush-hush-4"),
    ("ConsoleSettings", "viewer_token"): ("SOMA_CONSOLE_VIEWER_TOKEN", "hush-hush-hush-hush-5"),
}


def made(kind: str, env: Mapping[str, str]) -> Any:
    if kind == "ConsoleSettings":
        return ConsoleSettings.from_env(env)
    config = SomaConfig.from_env(STACK | dict(env))
    return config.kafka_security if kind == "KafkaSecurity" else config


def test_these_are_all_secrets() -> None:
    hidden = {
        (kind.__name__, field.name) for kind in (SomaConfig, KafkaSecurity, ConsoleSettings) for field in fields(kind)
        if not field.repr
    }  # fmt: skip
    assert hidden == set(SECRETS)
    assert secret_files() == {f"{name}_FILE" for name, _ in SECRETS.values()} | {"SOMA_CONSOLE_CERTIFICATE_KEY"}


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: ".".join(secret))
def test_it_comes_from_a_file_before_the_variable_and_is_not_printed(secret: tuple[str, str], tmp_path: Path) -> None:
    (kind, field), (name, value) = secret, SECRETS[secret]
    (tmp_path / "secret").write_text(f"{value}\n")
    settings = made(kind, {name: "x" * 30, f"{name}_FILE": str(tmp_path / "secret")})
    assert getattr(settings, field) == value
    assert "hush" not in repr(settings)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe", b"x" * 70_000])
@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: ".".join(secret))
def test_a_file_without_a_secret_is_an_error(secret: tuple[str, str], content: bytes, tmp_path: Path) -> None:
    name, _ = SECRETS[secret]
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{name}_FILE"):
        made(secret[0], {f"{name}_FILE": str(tmp_path / "secret")})


@pytest.mark.parametrize("path", ["/no/such/file", "/", "/dev/null", "\0", "x" * 5000])
def test_a_file_that_is_none_is_an_error(path: str) -> None:
    with pytest.raises(ConfigurationError, match="TOKEN_FILE"):
        secret_of({"TOKEN_FILE": path}, "TOKEN")


@pytest.mark.parametrize(
    "name", sorted({f"{name}_FILE" for name, _ in SECRETS.values()} | {"SOMA_CONSOLE_CERTIFICATE_KEY"})
)
@pytest.mark.parametrize(
    ("mode", "level"), [(0o600, Level.OK), (0o640, Level.OK), (0o644, Level.WARN), (0o602, Level.WARN)]
)
async def test_doctor_tells_of_files_that_are_open_to_everybody(
    name: str, mode: int, level: Level, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("postgresql://u:hush-hush-hush-hush@h/d")
    secret.chmod(mode)
    found = {finding.check: finding async for finding in look(Subject(STACK | {name: str(secret)}, Limits()))}
    assert (found["secrets"].level, "hush" in repr(found)) == (level, False)
    assert level is Level.OK or str(secret) in found["secrets"].text


async def test_doctor_tells_whether_the_console_would_start() -> None:
    async def console(**env: str) -> Level | None:
        found = {finding.check: finding async for finding in look(Subject(env, Limits()))}
        return found["console"].level if "console" in found else None

    assert await console() is None
    assert await console(SOMA_CONSOLE_PORT="1234") is Level.OK
    assert await console(SOMA_CONSOLE_HOST="0.0.0.0") is Level.FAIL
    assert await console(SOMA_CONSOLE_TOKEN_FILE="/no/such/file") is Level.FAIL
