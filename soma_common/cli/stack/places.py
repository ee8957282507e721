"""Where ``somastack up`` keeps what it started: under SOMA_FOLDER, the state beside the embedded database."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from soma_common.cli.stack.processes import Keeper, recorded, runs
from soma_common.config import SomaConfig
from soma_common.deployment import MODE_VARIABLES, DeployMode, parse_mode
from soma_common.errors import ConfigurationError, ServerUnavailable
from soma_common.guard import Record
from soma_common.locks import exclusive


class Server(StrEnum):
    """What ``up`` can start, in the order in which it does."""

    POSTGRES = "postgres"
    KAFKA = "kafka"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True)
class Started:
    """A server as ``up`` left it."""

    name: str
    version: str
    address: str
    log: str


@dataclass(frozen=True, slots=True)
class State:
    """What ``up`` did: for people, and for ``status``. What runs is told by the servers' own records."""

    mode: str = DeployMode.STANDALONE.value
    servers: tuple[Started, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    compose: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """The files of a stack in ``folder`` (SOMA_FOLDER)."""

    folder: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Places:
        """Those of the environment.

        Raises:
            ConfigurationError: SOMA_FOLDER is no folder's name.
        """
        given = {"SOMA_FOLDER": env["SOMA_FOLDER"]} if "SOMA_FOLDER" in env else {}
        return cls(SomaConfig.from_env(given).folder.absolute())

    @property
    def state_file(self) -> Path:
        return self.folder / "stack.json"

    @property
    def keeper(self) -> Keeper:
        return Keeper(self.folder / "keeper.json")

    def server(self, server: Server) -> Path:
        """The folder of a server of the lane; its data, its log and its records are there."""
        return self.folder / "stack" / server.value

    def log_of(self, server: Server, mode: str) -> Path:
        """What a server says."""
        embedded = mode == DeployMode.STANDALONE
        return self.folder / "postgres.log" if embedded else self.server(server) / "server.log"

    def record(self, server: Server, mode: str) -> Record | None:
        """The process of a server, if it runs."""
        folder = self.folder if mode == DeployMode.STANDALONE else self.server(server)
        found = recorded(folder / "pids.json")
        return found if found is not None and found.code is None and runs(found.server) else None

    def lasting(self) -> list[Server]:
        """The servers of the lane that have a folder here."""
        return [server for server in Server if self.server(server).is_dir()]

    @contextmanager
    def alone(self, within: float) -> Iterator[None]:
        """One command at a time changes what runs in a folder.

        Raises:
            ConfigurationError: the folder cannot be made or written.
            ServerUnavailable: another one is still at it after so many seconds.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
            with exclusive(self.folder / "stack.lock", within=within):
                yield
        except TimeoutError as error:
            raise ServerUnavailable(
                f"Another `somastack up` or `down` is at work in {self.folder}.", cure="wait for it, then try again."
            ) from error
        except OSError as error:
            if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(self.folder):
                raise
            raise ConfigurationError(
                f"{self.folder} cannot be used: {error.strerror}.", cure="set SOMA_FOLDER to a folder of your own."
            ) from error

    def read(self) -> State | None:
        """What ``up`` wrote; None when there is nothing, or nothing legible."""
        try:
            told = json.loads(self.state_file.read_text())
            servers = tuple(Started(**{name: str(one[name]) for name in _STARTED}) for one in told["servers"])
            env = {str(name): str(value) for name, value in told["env"].items()}
            return State(parse_mode(str(told["mode"])).value, servers, env, str(told.get("compose", "")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigurationError):
            return None

    def write(self, state: State) -> None:
        """For the owner's eyes: there is a password in it."""
        fresh = self.folder / "stack.json.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(asdict(state), indent=2) + "\n")
        fresh.replace(self.state_file)

    def forget(self) -> None:
        """There is no stack any more."""
        self.state_file.unlink(missing_ok=True)


_STARTED = ("name", "version", "address", "log")


def mode_of(env: Mapping[str, Any]) -> DeployMode | None:
    """The mode that the environment names, if it does.

    Raises:
        ConfigurationError: its name is unknown.
    """
    return next((parse_mode(env[name]) for name in MODE_VARIABLES if env.get(name)), None)


def effective(env: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the addresses of what ``up`` started where it names no mode itself."""
    if mode_of(env) is not None:
        return dict(env)
    state = Places.of(env).read()
    return dict(env) if state is None else {**state.env, **env}
