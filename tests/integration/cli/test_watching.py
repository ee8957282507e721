"""``status --watch`` and ``logs --follow``: they go on until Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path
from uuid import uuid4

import pytest

from soma_common.cli.stack.places import Places, Server, Started, State
from tests.cli_support import begun, somastack, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stack that runs nowhere; its log is real."""
    places = Places(tmp_path / "soma")
    log = places.log_of(Server.KAFKA, "somastack")
    log.parent.mkdir(parents=True)
    log.write_bytes(b"one\ntwo \x1b[31mred\xff\nthree\n")
    places.write(
        State("somastack", (Started("kafka", "4", "127.0.0.1:1", str(log)),), {"SOMA_DEPLOY_MODE": "somastack"})
    )
    return places.folder


def test_the_last_lines_steer_no_terminal(folder: Path) -> None:
    done = somastack("logs", "--lines", "2", SOMA_FOLDER=str(folder))
    assert done.stdout.splitlines() == ["two \\x1b[31mred�", "three"]
    assert somastack("logs", "kafka", "-n", "0", SOMA_FOLDER=str(folder)).stdout == ""
    (folder / "stack" / "postgres").mkdir()
    (folder / "stack" / "postgres" / "server.log").write_text("hello\n")
    lines = somastack("logs", SOMA_FOLDER=str(folder)).stdout.splitlines()
    assert lines[0] == "postgres | hello"
    assert lines[-1] == "kafka    | three"
    missing = somastack("logs", "registry", SOMA_FOLDER=str(folder))
    assert (missing.returncode, "no log of registry" in missing.stderr) == (1, True)
    assert somastack("logs", "moon", SOMA_FOLDER=str(folder)).returncode == 2


def test_a_log_is_followed_also_when_it_is_made_anew(folder: Path, tmp_path: Path) -> None:
    log = folder / "stack" / "kafka" / "server.log"
    following = begun("logs", "kafka", "-f", "-n", "1", SOMA_FOLDER=str(folder))
    try:
        assert following.stdout is not None
        assert following.stdout.readline() == "three\n"
        with log.open("a") as file:
            file.write("fo")
            file.flush()
            file.write("ur\n")
        assert following.stdout.readline() == "four\n"
        log.write_text("anew\n")
        assert following.stdout.readline() == "anew\n"
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 130
    finally:
        following.kill()
        following.communicate()


def test_a_log_of_one_endless_line_is_bounded(folder: Path) -> None:
    (folder / "stack" / "kafka" / "server.log").write_bytes(b"x" * 9_000_000 + b"\nend\n")
    done = somastack("logs", "-n", "2", SOMA_FOLDER=str(folder))
    assert done.stdout.endswith("\nend\n")
    assert len(done.stdout) < 5_000_000


def test_status_looks_again_and_again(soma_database: str) -> None:
    watching = begun("status", "--watch", "--every", "0.2", "--json", SOMASTACK_POSTGRES_DSN=soma_database)
    try:
        assert watching.stdout is not None
        assert [watching.stdout.readline().startswith('{"up":true') for _ in range(3)] == [True] * 3
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
    finally:
        watching.kill()
        watching.communicate()


def test_status_of_servers_that_are_not_there(soma_database: str) -> None:
    done = somastack(
        "status", "--json", "--within", "1", SOMA_DEPLOY_MODE="somastack", SOMASTACK_POSTGRES_DSN=soma_database,
        SOMASTACK_KAFKA_BOOTSTRAP="127.0.0.1:9", SOMASTACK_REGISTRY_URL="http://127.0.0.1:9", SOMA_FOLDER=f"/tmp/{uuid4().hex}",
    )  # fmt: skip
    assert done.returncode == 1
    assert {row["name"]: row["up"] for row in told(done)["components"] if row["up"] is not None} == {
        "postgres": True, "migrations": True, "kafka": False, "registry": False,
    }  # fmt: skip
    lines = somastack(
        "status",
        "--within",
        "1",
        SOMA_DEPLOY_MODE="somastack",
        SOMASTACK_POSTGRES_DSN=soma_database,
        SOMASTACK_KAFKA_BOOTSTRAP="127.0.0.1:9",
    ).stdout
    assert "kafka\tDOWN\t" in lines
