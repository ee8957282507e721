"""The log of commands that stay: for people or for machines, and an application's own where it has one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from soma_common.cli.new import write
from tests.cli_support import begun, environment, somastack

APP = """
import logging
from shop_one.app import soma
{setup}
@soma.handler("order.placed", consumer="mail")
async def mail(event, ctx):
    logging.getLogger("mail").warning("mailed %s", event.event_type)
    logging.getLogger("mail").error("unpaid")
"""
OWN = 'logging.basicConfig(format="mine %(message)s", force=True)'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write(tmp_path / "project", {"name": "shop-one", "package": "shop_one", "version": "0"})
    return tmp_path / "project"


def _lines(project: Path, dsn: str, *options: str, setup: str = "", **env: str) -> list[str]:
    """What a worker says that handles one event."""
    (project / "mailing.py").write_text(APP.format(setup=setup))
    env |= {"SOMASTACK_POSTGRES_DSN": dsn}
    placed = [sys.executable, "-m", "shop_one"]
    subprocess.run(placed, cwd=project, env=environment(**env), check=True, capture_output=True)
    with begun("worker", "mailing:soma", "--consumer", "mail", *options, cwd=project, **env) as worker:
        try:
            assert worker.stdout is not None
            said: list[str] = []
            for line in worker.stdout:
                said.append(line)
                if "unpaid" in line:
                    break
            worker.send_signal(signal.SIGTERM)
            worker.communicate(timeout=60)
        finally:
            worker.kill()
    assert worker.returncode == 0, said
    return [line for line in said if "mailed" in line or "unpaid" in line]


def test_in_a_pipe_it_is_json_with_the_name_of_the_service(project: Path, soma_database: str) -> None:
    first, second = map(json.loads, _lines(project, soma_database))
    assert (first["service"], first["level"], first["message"]) == ("shop-one", "WARNING", "mailed order.placed")
    assert re.fullmatch("[0-9a-f]{32}", first["trace_id"])
    assert (second["level"], second["trace_id"]) == ("ERROR", first["trace_id"])


def test_lines_for_people_from_a_level_on(project: Path, soma_database: str) -> None:
    [line] = _lines(project, soma_database, "--log-level", "error", SOMA_LOG_FORMAT="console", SOMA_LOG_LEVEL="DEBUG")
    assert re.search(r"\[shop-one\] \S+ ERROR unpaid\n", line), line


def test_an_application_that_sets_its_log_up_keeps_it(project: Path, soma_database: str) -> None:
    assert _lines(project, soma_database, setup=OWN) == ["mine mailed order.placed\n", "mine unpaid\n"]


@pytest.mark.parametrize("command", [["worker", "mailing:soma"], ["relay", "--name", "r"], ["collect"]])
@pytest.mark.parametrize(
    ("env", "options", "word"),
    [
        ({"SOMA_LOG_LEVEL": "LOUD\x1b[31m"}, [], "SOMA_LOG_LEVEL"),
        ({"SOMA_LOG_FORMAT": "xml\n"}, [], "SOMA_LOG_FORMAT"),
        ({}, ["--log-level", "9" * 5000], "--log-level"),
        ({}, ["--log-format", ""], "--log-format"),
    ],
)
def test_what_is_no_level_or_format_is_refused(
    command: list[str], env: dict[str, str], options: list[str], word: str
) -> None:
    done = somastack(*command, *options, **env)
    assert done.returncode == 2
    assert word in done.stderr
    assert "json" in done.stderr.lower() or "warning" in done.stderr.lower()
    assert "\x1b" not in done.stderr


def test_an_empty_variable_is_none(project: Path, soma_database: str) -> None:
    first, _ = map(json.loads, _lines(project, soma_database, SOMA_LOG_LEVEL="", SOMA_LOG_FORMAT=""))
    assert first["message"] == "mailed order.placed"
