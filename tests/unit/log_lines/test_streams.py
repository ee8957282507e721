"""Streams of all kinds: each gets its line, or loses it quietly; terminals get colours."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from soma_common.errors import ConfigurationError
from soma_common.logging.formatters import SomaStackFormatter
from soma_common.logging.streams import SomaStackHandler, looks_of
from tests.log_support import HEAD, check_console, parsed, python, record

SAY = """
import logging, sys
from soma_common import configure_logging
configure_logging(service="shop", format="{format}")
logging.getLogger("app").warning("gr\\xf6\\xdfe \\U0001f986 \\u65e5\\u672c %s", "\\ud800", extra={{"data": {{"k": "\\U0001f986"}}}})
logging.getLogger("app").error("second")
"""


class Tty(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "cp437", "latin-1", "utf-16", "cp932"])
@pytest.mark.parametrize("kind", ["console", "json"])
def test_streams_of_any_encoding(encoding: str, kind: str) -> None:
    done = python(SAY.format(format=kind), env={"PYTHONIOENCODING": encoding}, encoding=None)
    assert done.returncode == 0, done.stderr
    text = done.stderr.decode(encoding)
    if kind == "json":
        first, second = map(parsed, text.splitlines())
        assert (first["message"], second["message"]) == ("größe 🦆 日本 \\ud800", "second")
    else:
        lines = text.splitlines()
        assert len(lines) == 3
        assert HEAD.fullmatch(lines[0])
        assert HEAD.fullmatch(lines[2])
    assert "Logging error" not in text


@pytest.mark.parametrize("kind", ["console", "json"])
def test_the_c_locale(kind: str) -> None:
    env = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(SAY.format(format=kind), env=env)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == (3 if kind == "console" else 2)


def test_a_stock_handler_on_a_code_page_gets_lines_it_can_write() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    handler: Any = logging.StreamHandler(stream)
    handler.setFormatter(SomaStackFormatter(service="shop", stream=stream))
    handler.handle(record("größe 🦆"))
    assert raw.getvalue().decode("cp1252").rstrip().endswith("INFO größe \\U0001f986")


def test_our_handler_writes_what_another_formatter_made() -> None:
    raw = io.BytesIO()
    handler = SomaStackHandler(io.TextIOWrapper(raw, encoding="ascii"))
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.handle(record("größe 🦆"))
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\U0001f986\n"


def test_a_closed_stream_loses_lines_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = SomaStackHandler(stream)
    stream.close()
    handler.handle(record())
    handler.flush()
    handler.close()
    assert handler.lost >= 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("closing", ["sys.stderr.close()", "sys.stderr = None", "import os; os.close(2)"])
def test_a_standard_stream_that_has_gone(closing: str) -> None:
    done = python(SAY.format(format="json") + f"\n{closing}\nlogging.getLogger('app').error('third')\nprint('went on')")
    assert done.stdout == "went on\n"
    assert "Logging error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_standard_stream_that_was_replaced_is_followed(capsys: pytest.CaptureFixture[str]) -> None:
    handler = SomaStackHandler("stdout")
    handler.handle(record("here"))
    assert capsys.readouterr().out == "here\n"
    with pytest.raises(ConfigurationError, match="no stream"):
        SomaStackHandler("somewhere")  # type: ignore[arg-type]


def test_a_broken_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        script = (
            SAY.format(format="json")
            + "\nfor n in range(1000):\n    logging.getLogger('app').error('more')\nprint('went on')"
        )
        done = python(script, stderr=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_reader_that_leaves() -> None:
    script = SAY.format(format="json").replace("format=", "stream='stdout', format=") + (
        "\nfor n in range(20000):\n    logging.getLogger('app').error('more ' * 20)\nsys.stderr.write('went on')"
        "\nsys.stderr.flush()\nimport os; os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"went on"


@pytest.mark.parametrize(
    ("env", "colour"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"COLUMNS": "0"}, True),
        ({"COLUMNS": "not a number", "LINES": "-1"}, True),
    ],
    ids=str,
)
def test_colours_on_a_terminal(env: dict[str, str], colour: bool) -> None:
    assert looks_of(Tty(), env=env).colour is colour
    assert looks_of(Tty(), env=env, colour=True).colour is True


def test_colours_are_forced_where_no_terminal_is() -> None:
    assert looks_of(io.StringIO(), env={}).colour is False
    assert looks_of(io.StringIO(), env={"FORCE_COLOR": "1"}).colour is True


@pytest.mark.parametrize("columns", ["0", "1", "-5", "none"])
def test_the_width_of_the_terminal_changes_nothing(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert (
        len(check_console(SomaStackFormatter(service="shop", emoji=True, colour=False).format(record("x" * 300)))) == 1
    )


@pytest.mark.parametrize(
    "stream",
    [None, object(), io.BytesIO(), type("S", (), {"encoding": "none-such"})(), type("S", (), {"encoding": 7})()],
    ids=["none", "object", "bytes", "unknown-encoding", "number"],
)
def test_streams_that_are_none(stream: Any) -> None:
    looks = looks_of(stream, env={})
    assert looks.colour is False
    check_console(SomaStackFormatter(service="shop", stream=stream).format(record("🦆")))


def test_emoji_only_where_the_stream_has_them() -> None:
    assert looks_of(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), env={}).emoji
    assert not looks_of(io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), env={}).emoji
    ascii_only = SomaStackFormatter(service="shop", emoji=False, colour=False)
    assert ascii_only.format(record("said", trace_id="0af7651916cd43dd")).isascii()
    assert " trace=0af76519 INFO said" in ascii_only.format(record("said", trace_id="0af7651916cd43dd"))
