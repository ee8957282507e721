"""A fresh virtual environment with the library's wheel in it: as a user has it who never saw this repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PATIENCE = 600  # seconds: packages may have to be downloaded


@dataclass(frozen=True, slots=True)
class FreshEnvironment:
    """An environment in ``folder``; ``wheel`` was built from this repository."""

    folder: Path
    wheel: Path

    @classmethod
    def make(cls, folder: Path) -> FreshEnvironment:
        """Build the wheel from what git knows of, or would add, and make an environment for it."""
        _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist"), str(ROOT)], folder)
        [wheel] = (folder / "dist").glob("*.whl")
        _run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
        return cls(folder, wheel)

    @property
    def bin(self) -> Path:
        """Where its programs are."""
        return self.folder / "venv" / "bin"

    def install(self, project: Path, extra: str = "test") -> None:
        """Install a project that needs the library, with the wheel for it."""
        command = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*command, f"soma-common[testing] @ {self.wheel.as_uri()}", f"{project}[{extra}]"], self.folder)

    def run(self, *command: str, cwd: Path) -> str:
        """The output of a program of the environment; nothing of ours is on its path.

        Raises:
            AssertionError: it failed; has the end of its output.
        """
        return _run([str(self.bin / command[0]), *command[1:]], cwd)


def copied(project: Path, to: Path) -> Path:
    """A copy of a project outside of this repository."""
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.egg-info", ".hypothesis")
    return Path(shutil.copytree(project, to, ignore=ignored))


def _run(command: list[str], cwd: Path) -> str:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTEST", "COV"))}
    done = subprocess.run(
        command, cwd=cwd, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout
