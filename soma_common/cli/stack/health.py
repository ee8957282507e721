"""How the components stand: each asked at the same time as the others, each with an end."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from soma_common.cli.checks.connecting import asked, unpooled
from soma_common.cli.stack.places import Places
from soma_common.config import SomaConfig
from soma_common.errors import SomaError
from soma_common.moments import span
from soma_common.postgres import migrate
from soma_common.postgres.embedded import EmbeddedPostgres

_COUNTED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """A component. ``up`` None: it is told for information, and cannot be down. ``took``: seconds of the answer."""

    name: str
    up: bool | None
    version: str = "-"
    lag: str = "-"
    disk: str = "-"
    detail: str = ""
    took: float | None = None


def down(rows: list[Row]) -> list[Row]:
    """Those that are down."""
    return [row for row in rows if row.up is False]


async def look(env: Mapping[str, str], within: float) -> list[Row]:
    """Every component of the environment; no question takes longer than ``within`` seconds.

    Raises:
        ConfigurationError: the environment cannot be understood.
    """
    config = SomaConfig.from_env(env)
    asked: list[tuple[str, Callable[[SomaConfig, float], Awaitable[list[Row]]]]] = [("postgres", _postgres)]
    if config.uses_kafka:
        asked.append(("kafka", _kafka))
    if config.registry_url:
        asked.append(("registry", _registry))
    asked.append(("work", _work))
    several = await asyncio.gather(*(_bounded(name, ask(config, within), within) for name, ask in asked))
    versions = _started_versions(env)
    rows = [
        row if row.version != "-" else replace(row, version=versions.get(row.name, "-"))
        for rows in several
        for row in rows
    ]
    return [*rows, _disk(config)]


def _started_versions(env: Mapping[str, str]) -> Mapping[str, str]:
    """The versions of servers that ``up`` started, where the environment means these: Kafka tells none itself."""
    state = Places.of(env).read()
    if state is None or any(env.get(name) != value for name, value in state.env.items()):
        return {}
    return {server.name: server.version for server in state.servers}


async def _bounded(name: str, asking: Awaitable[list[Row]], within: float) -> list[Row]:
    began = time.monotonic()
    try:
        async with asyncio.timeout(within + 1.0):  # connecting has the bound itself, and says more
            return await asking
    except SomaError as error:
        return [] if name == "work" else [Row(name, False, detail=error.message, took=time.monotonic() - began)]
    except TimeoutError:
        return [] if name == "work" else [Row(name, False, detail=f"no answer within {within:g} s")]


async def _postgres(config: SomaConfig, within: float) -> list[Row]:
    if not config.postgres_dsn and not EmbeddedPostgres(config.folder).runs:
        return [Row("postgres", False, detail=f"the embedded database in {config.folder} does not run: somastack up")]
    async with unpooled(config, within) as pool:
        began = time.monotonic()
        server = (await asked(pool, "server"))[0]
        took = time.monotonic() - began
        detail = f"{server['connections']} of {server['most']} connections"
        if server["standby"]:
            detail = f"a standby: it takes no events; {detail}"
        row = Row(
            "postgres", not server["standby"], server["version"], disk=_size(server["bytes"]), detail=detail, took=took
        )
        return [row, await _migrations(pool.settings.dsn)]


async def _migrations(dsn: str) -> Row:
    try:
        known = await migrate.status(dsn)
    except SomaError as error:
        return Row("migrations", False, detail=error.message)
    missing = sum(each.applied_at is None for each in known)
    newest = f"{known[-1].version:04d}"
    if missing:
        return Row("migrations", False, newest, lag=str(missing), detail=f"{missing} are missing: somastack db upgrade")
    return Row("migrations", True, newest, lag="0")


async def _kafka(config: SomaConfig, within: float) -> list[Row]:
    from soma_common.kafka.inspecting import inspect

    began = time.monotonic()
    facts = await inspect(config.kafka_bootstrap, config.kafka_security, [config.topic], timeout=within)
    topic = facts.topics[config.topic]
    told = f"{config.topic} has {topic.partitions} partitions" if topic else f"{config.topic} is not there yet"
    many = f"{facts.brokers} broker{'' if facts.brokers == 1 else 's'}"
    leaderless = topic.leaderless if topic else 0
    return [Row("kafka", not leaderless, facts.version or "-", detail=f"{many}, {told}", took=time.monotonic() - began)]


async def _registry(config: SomaConfig, within: float) -> list[Row]:
    from soma_common.schemas.address import RegistryAuth, check_url
    from soma_common.schemas.rest import Patience, Rest

    auth = RegistryAuth(token=config.registry_token) if config.registry_token else None
    rest = Rest(check_url(config.registry_url), auth, Patience(timeout=within, attempts=1))
    began = time.monotonic()
    try:
        answer = await rest.send("GET", "/system/info")
        rest.expect(answer)
    finally:
        await rest.close()
    return [
        Row("registry", True, str(answer.at("version")), detail=str(answer.at("name")), took=time.monotonic() - began)
    ]


async def _work(config: SomaConfig, within: float) -> list[Row]:
    async with unpooled(config, within) as pool:
        rows = [_reader(row) for row in await asked(pool, "readers")]
        if config.uses_kafka:
            rows += _offsets(await asked(pool, "offsets"), await _ends(config, pool, within))
        letters = await asked(pool, "gauges", file="dead_letters")
        sagas = dict(map(tuple, await asked(pool, "sagas")))
    rows.append(Row("dead letters", None, lag=str(sum(letter[2] for letter in letters)), detail="open"))
    stuck = sagas.pop("stuck", 0)
    return [*rows, Row("sagas", None, lag=str(sum(sagas.values())), detail=f"under way; {stuck} stuck")]


def _reader(row: Any) -> Row:
    name, alive, idle, behind, oldest, _ = row
    kind, _, who = name.partition(":")
    many = f">{_COUNTED:,}" if behind > _COUNTED else f"{behind:,}"
    detail = f"{alive} at work, moved {span(idle)} ago" + (
        f", the oldest event waits since {span(oldest)}" if behind else ""
    )
    return Row(f"{kind} {who}", None, lag=many, detail=detail)


async def _ends(config: SomaConfig, pool: Any, within: float) -> Mapping[tuple[str, int], int]:
    """Where the partitions end that consumers read; none where Kafka does not tell."""
    from soma_common.consumer.source import Partition
    from soma_common.events.codec import JsonCodec
    from soma_common.kafka.reader import ReaderSettings, TopicReader

    wanted = {Partition(row[1], row[2]) for row in await asked(pool, "offsets")}
    if not wanted:
        return {}
    reader = TopicReader(ReaderSettings(bootstrap=config.kafka_bootstrap, security=config.kafka_security), JsonCodec())
    try:
        async with asyncio.timeout(within):
            ranges = await reader.ranges(wanted)
    except (SomaError, TimeoutError):
        return {}
    finally:
        await reader.close()
    return {(partition.name, partition.number): end for partition, (_, end) in ranges.items()}


def _offsets(rows: Any, ends: Mapping[tuple[str, int], int]) -> list[Row]:
    """Consumers of Kafka, each with the records before it in all its partitions."""
    lags: dict[str, list[int | None]] = {}
    for name, topic, partition, following in rows:
        end = ends.get((topic, partition))
        lags.setdefault(name, []).append(None if end is None else max(0, end - following))
    return [
        Row(f"consumer {name}", None, lag="-" if None in several else f"{sum(filter(None, several)):,}",
            detail=f"{len(several)} partitions")
        for name, several in lags.items()
    ]  # fmt: skip


def _disk(config: SomaConfig) -> Row:
    folder = config.folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        usage = shutil.disk_usage(nearest)
    except OSError as error:
        return Row("disk", False, detail=f"{nearest}: {error.strerror}")
    return Row("disk", None, disk=f"{_size(usage.free)} free", detail=str(folder))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
