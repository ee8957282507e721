"""Help: quick, with examples that the commands understand; and output that bears any stream."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.shell_completion import ShellComplete

from soma_common.cli.main import somastack
from tests.cli_support import COMMAND, environment
from tests.cli_support import somastack as run


def commands(group: click.Group, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


LEAVES = list(commands(somastack))


@pytest.mark.parametrize(
    ("path", "command"), LEAVES, ids=lambda given: " ".join(given) if isinstance(given, tuple) else ""
)
def test_every_command_shows_an_example_that_it_understands(
    path: tuple[str, ...], command: click.Command, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOMA_SERVICE_ID", raising=False)
    for name in ("value.json", "keep.toml"):
        (tmp_path / name).write_text("")
    if path == ("console",):
        return  # nothing to be said of it here
    _, _, examples = f"{command.help}\n{command.epilog}".partition("Examples:")
    shown = re.findall(r"^ +(somastack .*|eval .*)$", examples, re.MULTILINE)
    assert shown, path
    for line in shown:
        words = shlex.split(re.split(r" && | \| | > ", re.sub(r'^eval "\$\((.*)\)"$', r"\1", line))[0])
        assert tuple(words[1 : 1 + len(path)]) == path
        command.make_context(path[-1], words[1 + len(path) :])


def test_names_are_completed_without_loading_the_commands() -> None:
    script = (
        "import sys; from soma_common.cli.main import somastack; from click.shell_completion import ShellComplete; "
        "print([i.value for i in ShellComplete(somastack, {}, 'somastack', '_X').get_completions([], '')]); "
        "print([n for n in ('aiokafka', 'asyncpg', 'rich', 'soma_common.app') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    assert "'doctor'" in names
    assert "'worker'" in names
    assert loaded == "[]"


def test_completion_knows_options_of_the_whole_command() -> None:
    shell = ShellComplete(somastack, {}, "somastack", "_X")
    assert "--version" in [item.value for item in shell.get_completions([], "--")]
    assert {"bash", "zsh", "fish"} == {item.value for item in shell.get_completions(["completion"], "")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_and_nothing_else(shell: str) -> None:
    done = run("completion", shell, PATH="/nonexistent")
    assert (done.returncode, done.stderr) == (0, "")
    assert "_SOMASTACK_COMPLETE" in done.stdout


def test_help_answers_at_once() -> None:
    took = [_seconds() for _ in range(5)]
    assert min(took) < 0.2


def _seconds() -> float:
    before = os.times()
    subprocess.run([*COMMAND, "--help"], env=environment(), capture_output=True, check=True)
    after = os.times()  # processor time: other programs of this machine do not count
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join(COMMAND)} doctor --only machine | true; echo ${{PIPESTATUS[0]}}"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_terminal_without_unicode_and_without_colour() -> None:
    done = run("doctor", "--only", "machine", PYTHONIOENCODING="ascii:backslashreplace", LC_ALL="C", NO_COLOR="")
    assert "ok   machine: python" in done.stdout
    assert "\x1b" not in done.stdout
