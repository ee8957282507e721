"""The stack as containers, where an engine answers and a compose file is there.

UNPROVEN where no container engine runs, its authors' machine included: only the choice and the commands are tested.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

from soma_common.cli.stack.places import Server
from soma_common.errors import MissingDependency, ServerUnavailable

_FILES = ("compose.yaml", "compose.yml", "docker-compose.yml")
_PATIENCE = 10.0  # seconds for the engine to answer
_SERVICES = {Server.POSTGRES: "postgres", Server.KAFKA: "kafka", Server.REGISTRY: "apicurio"}
PROJECT = "somastack"


def engine_answers() -> bool:
    """Whether a container engine takes commands here."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, timeout=_PATIENCE, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def compose_file() -> Path | None:
    """The compose file of this installation, if it has one."""
    from soma_common.testing.deployments import deployments_folder

    folder = deployments_folder() / "compose"
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def choose(
    backend: str, *, engine: Callable[[], bool] = engine_answers, file: Callable[[], Path | None] = compose_file
) -> Path | None:
    """The compose file to use, or None for processes of this machine.

    Args:
        backend: auto, compose or local.

    Raises:
        MissingDependency: compose is wanted, and there is no file or no engine.
    """
    if backend == "local":
        return None
    found = file()
    if found is not None and engine():
        return found
    if backend == "compose":
        why = "no compose file is part of this installation" if found is None else "no container engine answers"
        raise MissingDependency(f"--backend compose cannot be used: {why}.", cure="use --backend local.")
    return None


def command(file: Path, *arguments: str) -> list[str]:
    """A command line of ``docker compose`` for the stack."""
    return ["docker", "compose", "--project-name", PROJECT, "--file", str(file), *arguments]


def start(file: Path, servers: Collection[Server], within: float) -> None:
    """Start services and wait until they are healthy.

    Raises:
        ServerUnavailable: compose failed; it has said why.
    """
    names = [_SERVICES[server] for server in Server if server in servers]
    _run(command(file, "up", "--detach", "--wait", "--wait-timeout", str(int(within)), *names))


def stop(file: Path, *, volumes: bool) -> None:
    """End the services; with ``volumes`` their data too.

    Raises:
        ServerUnavailable: compose failed; it has said why.
    """
    _run(command(file, "down", *(["--volumes"] if volumes else [])))


def _run(line: list[str]) -> None:
    if subprocess.run(line, stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise ServerUnavailable(f"`{' '.join(line)}` failed.", cure="what it said stands above.")
