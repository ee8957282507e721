"""Every snippet of README and docs runs, and prints what the page says.

A ``python`` fence is a script; one that begins with ``# name.py`` is saved under that name for later fences.
A ``console`` fence holds ``$ commands`` with their output; a ``text`` fence after a script holds the script's output.
``...`` stands for any text. The fences of a page run in order, in one fresh folder with one embedded database.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.temporal_server import temporal_server

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"^# (\w+\.py)\n")
_NOT_A_READERS = ("SOMA", "PYTEST", "COV", "CI", "BUILD_NUMBER")  # on CI pytest writes every reason out twice
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if any(kind in ("python", "console") for kind, _ in _FENCE.findall(page.read_text()))
]


@dataclass(frozen=True, slots=True)
class Step:
    """A command and what it must print (None: anything)."""

    command: list[str] | str
    expected: str | None


def steps_of(page: str, folder: Path) -> list[Step]:
    """The commands of a page, in order; scripts are written into the folder."""
    steps: list[Step] = []
    fences = _FENCE.findall(page)
    for number, (kind, body) in enumerate(fences):
        following = fences[number + 1] if number + 1 < len(fences) else ("", "")
        if kind == "python":
            name = _NAME.match(body)
            script = folder / (name[1] if name else f"snippet_{number}.py")
            script.write_text(body)
            if not name:
                steps.append(Step([sys.executable, script.name], following[1] if following[0] == "text" else None))
        elif kind == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                steps.append(Step(command, output))
    return steps


def matches(expected: str, printed: str) -> bool:
    """Whether a text is what was expected, where ``...`` stands for anything."""
    pattern = ".*".join(
        re.escape(part) for part in "\n".join(map(str.rstrip, expected.strip().splitlines())).split("...")
    )
    return re.fullmatch(pattern, "\n".join(map(str.rstrip, printed.strip().splitlines())), re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_run_and_print_what_it_says(page: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_A_READERS)}
    env |= {"SOMA_FOLDER": str(tmp_path / "db"), "NO_COLOR": "1", "COLUMNS": "100", "PYTHONWARNINGS": "error"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with servers_of(page, tmp_path) as addresses:
        try:
            run_page(page, tmp_path, env | addresses)
        finally:
            _end_what_was_started(tmp_path, env)


def _end_what_was_started(folder: Path, env: dict[str, str]) -> None:
    """A page that failed has not come to its `somastack down`."""
    if (folder / "db" / "stack.json").exists():
        subprocess.run(["somastack", "down"], cwd=folder, env=env, capture_output=True, timeout=120, check=False)


@contextmanager
def servers_of(page: Path, folder: Path) -> Iterator[dict[str, str]]:
    """What a page finds running beside the database."""
    if page.name != "temporal.md":
        yield {}
        return
    with temporal_server(folder) as address:
        yield {"TEMPORAL_ADDRESS": address}


def run_page(page: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """Run all steps of a page, in order."""
    steps = steps_of(page.read_text(), tmp_path)
    assert steps, f"{page} has fences but nothing to run"
    for step in steps:
        shell = isinstance(step.command, str)
        done = subprocess.run(
            step.command, shell=shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170, check=False
        )
        printed = done.stdout + done.stderr
        assert shell or done.returncode == 0, f"{step.command}: {printed}"
        if step.expected is not None:
            # What a script tells on stderr (a log line, progress of a download) may be shown on the page or not.
            script = not shell or str(step.command).startswith("python ")
            assert matches(step.expected, printed) or (script and matches(step.expected, done.stdout)), (
                f"{step.command} printed:\n{printed}\nnot:\n{step.expected}"
            )


def test_the_comparison_notices_a_difference() -> None:
    assert matches("a ... c\n", "a b c\n")
    assert not matches("a b\n", "a c\n")
