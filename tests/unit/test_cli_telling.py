"""What commands say of errors on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from soma_common.cli.telling import complain
from soma_common.errors import ValidationError
from soma_common.escaping import json_text, plain


@pytest.mark.parametrize("command", [("events", "list"), ("dlq", "list")])
@pytest.mark.parametrize(("no_color", "red"), [("1", False), ("", True)])
def test_no_color_is_obeyed(command: tuple[str, ...], no_color: str, red: bool) -> None:
    main, end = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOMA")}
    env = clean | {"NO_COLOR": no_color, "TERM": "xterm-256color"}
    subprocess.run(
        [sys.executable, "-m", "soma_common.cli.main", *command, "--all-tenants", "--trace", "zz"],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=end, timeout=60, check=False,
    )  # fmt: skip
    os.close(end)
    told = os.read(main, 65536).decode()
    os.close(main)
    assert "Error: trace_id" in told
    assert ("\x1b[" in told) == red


HOSTILE = "a\x1b]0;title\x07b\x9b2Jc\u202ed\re\nCure:  f"
ESCAPED = r"a\x1b]0;title\x07b\x9b2Jc\u202ed\re"


@pytest.mark.parametrize("no_color", ["1", ""])
def test_what_an_error_quotes_does_not_steer_the_terminal(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        complain(ValidationError(HOSTILE, cure=HOSTILE))

    monkeypatch.setenv("NO_COLOR", no_color)
    told = CliRunner().invoke(command, color=True).stderr  # as on a terminal: click strips nothing
    left = told.replace(click.style("", fg="red", reset=False), "").replace(click.style(""), "")
    below = " " * 7 + "Cure:  f"  # cannot pass for the error's own
    assert left.splitlines() == [f"Error: {ESCAPED}", below, f"Cure:  {ESCAPED}", below]


def test_only_what_steers_is_escaped() -> None:
    assert plain("é 🔗 \x9b\\") == "é 🔗 \\x9b\\"
    assert plain("a\n\tb\r", lines=True) == "a\n\tb\\r"
    value = {"é": "\x9b\u202e\x7f\x1b\U000e0041", "n": [1]}
    for indent in (False, True):
        text = json_text(value, indent=indent)
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "é" in text
        assert json.loads(text) == value
