"""The servers of the demo: an embedded PostgreSQL, or PostgreSQL, Kafka and Apicurio as local processes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from soma_common.deployment import DeployMode
from soma_common.errors import ConfigurationError, MissingDependency
from soma_common.guard import Record

if TYPE_CHECKING:
    from soma_common.testing.run import ServerRun

_OURS = ("SOMA_", "SOMASTACK_", "SA01_")
_T = TypeVar("_T")

Env = dict[str, str]


def clean_environment() -> Env:
    """The environment without settings of other Soma programs, but with those of the test servers."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_OURS) or name.startswith("SOMA_TEST_")
    }


@asynccontextmanager
async def servers(mode: DeployMode, folder: Path, say: Callable[[str], None]) -> AsyncIterator[Mapping[str, str]]:
    """Start what a mode needs; the settings that lead an application there. Everything has ended afterwards.

    ``say`` is told what is being started.

    Raises:
        ConfigurationError: the mode needs a cluster.
        MissingDependency, ServerUnavailable, EmbeddedPostgresError: with cause and cure.
    """
    if mode is DeployMode.STANDALONE:
        say("embedded PostgreSQL")
        async with _standalone(folder) as env:
            yield env
    elif mode is DeployMode.SOMASTACK:
        async with _somastack(folder, say) as env:
            yield env
    else:
        raise ConfigurationError(f"The demo does not run in mode {mode}.", cure="use standalone or somastack.")


@asynccontextmanager
async def _standalone(folder: Path) -> AsyncIterator[Env]:
    soma = folder / "soma"
    try:
        yield {"SOMA_DEPLOY_MODE": "standalone", "SOMA_FOLDER": str(soma)}
    finally:
        await _ended(soma / "pids.json")


async def _ended(pids: Path, within: float = 30.0) -> None:
    """Wait until the embedded server, which nobody uses any more, has gone."""
    record = Record.read(pids)
    for _ in range(int(within / 0.02)):
        if record is None or not _lives(record.server.pid):
            return
        await asyncio.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another account's: it lives
        return True
    return True


@asynccontextmanager
async def _somastack(folder: Path, say: Callable[[str], None]) -> AsyncIterator[Env]:
    # Imported here: standalone needs neither psutil nor Java.
    try:
        from soma_common.testing.run import ServerRun
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Mode somastack needs {error.name} for its local servers.", cure="pip install 'soma-common[testing]'."
        ) from error
    run = ServerRun(os.environ)
    name = f"flights_{os.getpid()}"
    try:
        settings = await in_thread(lambda: _start(run, name, say))
        yield {"SOMA_DEPLOY_MODE": "somastack", "SOMA_FOLDER": str(folder / "soma"), **settings}
        run.postgres().sql.drop_database(name)
    finally:
        run.close()


def _start(run: ServerRun, name: str, say: Callable[[str], None]) -> Env:
    """A fresh database on the run's PostgreSQL, its Kafka with a topic of our own, its registry."""
    say("PostgreSQL")
    postgres = run.postgres()
    dsn = postgres.sql.create_database(name, template=run.template(postgres))
    say("Kafka (the first time, its jars are downloaded)")
    kafka = run.kafka()
    say("Apicurio Registry")
    registry = run.registry()
    return {
        "SOMASTACK_POSTGRES_DSN": dsn,
        "SOMASTACK_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "SOMASTACK_REGISTRY_URL": registry.url,
        "SOMA_TOPIC": f"soma.flights.events.{os.getpid()}",
    }


async def in_thread(work: Callable[[], _T]) -> _T:
    """The result of blocking work. Unlike an executor's, its thread does not keep a cancelled program alive."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # without an error it is the result

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as caught:
            result, error = None, caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="servers", daemon=True).start()
    return await done
