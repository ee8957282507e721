"""What commands show on a terminal: signs, colours and tables; and what NO_COLOR leaves of it."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.cli_support import COMMAND, environment


def on_terminal(*arguments: str, **env: str) -> str:
    """What a command writes to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    given = environment(TERM="xterm-256color", COLUMNS="120", LINES="40", **env)
    if not env.get("NO_COLOR"):
        del given["NO_COLOR"]
    process = subprocess.Popen([*COMMAND, *arguments], env=given, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the other side is closed
        pass
    process.wait(60)
    os.close(ours)
    return said.decode()


def test_doctor_has_signs_in_colours(tmp_path: Path) -> None:
    said = on_terminal("doctor", "--only", "settings", SOMA_FOLDR="x", PYTHONUTF8="1")
    assert "\x1b[32m ✓  \x1b[0m settings: settings" in said
    assert "\x1b[33m !  \x1b[0m settings: names" in said


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_doctor_has_words_where_signs_or_colours_cannot_be(env: dict[str, str]) -> None:
    said = on_terminal("doctor", "--only", "settings", SOMA_FOLDR="x", **env)
    assert "\x1b[3" not in said
    assert "ok   settings: settings" in said
    assert "warn settings: names" in said


def test_status_is_a_table(tmp_path: Path) -> None:
    said = on_terminal("status", SOMA_FOLDER=str(tmp_path))
    assert "component" in said
    assert "answered in" in said
    assert "\x1b[1;31mDOWN" in said
    assert "\x1b[" not in on_terminal("status", SOMA_FOLDER=str(tmp_path), NO_COLOR="1").replace("\x1b[1m", "").replace(
        "\x1b[0m", ""
    )


def test_names_of_folders_steer_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31mb\u202e"
    said = on_terminal("status", SOMA_FOLDER=str(folder)) + on_terminal(
        "doctor", "--only", "machine", SOMA_FOLDER=str(folder)
    )
    said += on_terminal("logs", SOMA_FOLDER=str(folder)) + on_terminal("down", SOMA_FOLDER=str(folder))
    assert "\x1b[31mb" not in said
    assert "\u202e" not in said
