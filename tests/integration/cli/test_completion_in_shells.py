"""Real shells on a pseudo-terminal: a person types the beginning of a word and presses the tabulator."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli_support import environment, somastack
from tests.debian_program import debian_folder, debian_program

_PATIENCE = 60.0  # seconds for an answer of the command, on a busy machine
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r|\x07")


class Terminal:
    """A shell with a terminal of 120 columns."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._shell = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.said = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, wanted: str, within: float = _PATIENCE) -> str:
        """What the terminal shows until it shows this; what stood there before is forgotten."""
        deadline = time.monotonic() + within
        while wanted not in self.said:
            assert time.monotonic() < deadline, f"{wanted!r} did not come in:\n{self.said}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.said += _CONTROL.sub("", os.read(self._ours, 65536).decode(errors="replace"))
        said, self.said = self.said, ""
        return said

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._ours)


@contextmanager
def shell(name: str, folder: Path) -> Iterator[Terminal]:
    """A shell that has read the completion script, as its help says."""
    env = environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", TERM="xterm", COLUMNS="120", HOME=str(folder)
    )
    (folder / "script").write_text(somastack("completion", name).stdout)
    if name == "bash":
        command, ready = [debian_program("bash", "bash"), "--norc", "--noprofile"], ". ./script\n"
    else:
        command, ready = [debian_program("zsh", "zsh", "zsh-common"), "-f"], _zsh()
    terminal = Terminal(command, folder, env)
    try:
        terminal.type(f"{ready}PS1='%% '; PS1=${{PS1:0:1}}; stty cols 120 rows 50; echo re''ady\n")
        terminal.until("ready\n")
        yield terminal
    finally:
        terminal.close()


def _zsh() -> str:
    root = debian_folder("zsh", "zsh-common")
    return (
        f"module_path=({root}/usr/lib/*/zsh/*(N)); fpath=({root}/usr/share/zsh/functions/**/*(/N)); "
        "autoload -Uz compinit; compinit -u -D; LISTMAX=1000; . ./script\n"
    )


SHELLS = ("bash", "zsh")


@pytest.mark.parametrize("name", SHELLS)
def test_a_command_is_completed(name: str, tmp_path: Path) -> None:
    with shell(name, tmp_path) as terminal:
        terminal.type("somastack doc\t")
        terminal.until("somastack doctor")


@pytest.mark.parametrize("name", SHELLS)
def test_commands_of_a_group_are_listed(name: str, tmp_path: Path) -> None:
    with shell(name, tmp_path) as terminal:
        terminal.type("somastack replay p\t\t")
        assert "pause" in terminal.until("plan")  # they are listed in the order of the alphabet


@pytest.mark.parametrize("name", SHELLS)
def test_options_and_their_values_are_completed(name: str, tmp_path: Path) -> None:
    with shell(name, tmp_path) as terminal:
        terminal.type("somastack up --mod\t")
        terminal.until("somastack up --mode")
        terminal.type(" stand\t")
        terminal.until("standalone")


@pytest.mark.parametrize("name", SHELLS)
def test_applications_of_this_folder_are_completed(name: str, tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "app.py").write_text("raise SystemExit('nobody imports this')\nsoma: Soma = Soma(config)\n")
    with shell(name, tmp_path) as terminal:
        terminal.type("somastack worker sh\t")
        terminal.until("shop.app:soma")
