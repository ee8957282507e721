"""The central log has what every service recorded: each event once, as it was, whatever is killed meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import pytest
from aiokafka import AIOKafkaProducer

from soma_common import DeployMode, EventFilter, RecordedEvent, Soma, SomaConfig
from soma_common.errors import ConfigurationError, TenantRequired
from soma_common.events.models import NOT_RECORDED
from soma_common.events.store import ALL_TENANTS
from soma_common.probes import Probes
from soma_common.testing import eventually, make_event
from soma_common.testing.backends import KafkaHandle, PostgresHandle
from soma_common.testing.lane.kafka_wire import Topic
from soma_common.testing.lane.ports import free_port
from tests.integration.collector.central import Central

SERVICES = ("shop", "stock")


@pytest.fixture
def databases(soma_postgres: PostgresHandle, soma_database: str) -> Iterator[list[str]]:
    """One for each service, and for the central log; all have the migrations."""
    names = [f"soma_collect_{uuid.uuid4().hex[:12]}" for _ in SERVICES]
    template = soma_database.rpartition("/")[2]
    yield [soma_postgres.sql.create_database(name, template=template) for name in names] + [soma_database]
    for name in names:
        soma_postgres.sql.drop_database(name)


@pytest.fixture
async def world(databases: list[str], soma_kafka: KafkaHandle) -> AsyncIterator[Central]:
    """Two services with relays, and a central database."""
    prefix = f"soma.c{uuid.uuid4().hex[:8]}."
    async with AsyncExitStack() as stack:
        services = []
        for service, dsn in zip(SERVICES, databases, strict=False):
            topic = f"{prefix}{service}"
            soma_kafka.create_topic(Topic(topic, partitions=3))
            config = SomaConfig(
                mode=DeployMode.SOMASTACK, service_id=service, postgres_dsn=dsn, topic=topic,
                kafka_bootstrap=soma_kafka.bootstrap,
            )  # fmt: skip
            soma = await stack.enter_async_context(Soma(config))
            await stack.enter_async_context(soma.relay())
            services.append(soma)
        yield await stack.enter_async_context(Central(databases[-1], soma_kafka.bootstrap, prefix, services))


def _events(count: int, **fields: Any) -> list[Any]:
    given = {"event_type": "order.placed", "tenant_id": "acme"} | fields
    return [make_event({"n": n, "text": "zwölf\u2028"}, aggregate_id=f"o-{n % 5}", **given) for n in range(count)]


def _as_told(event: RecordedEvent) -> RecordedEvent:
    """What a service said of it: not where it stands in which log."""
    return replace(event, position=0, version=0, recorded_at=NOT_RECORDED)


async def test_every_event_of_every_service_is_there_as_it_was(world: Central) -> None:
    shop, stock = world.services
    told = [*await shop.publish(_events(40)), *await stock.publish(_events(40, metadata={"by": "hand"}))]
    async with world.collector():
        await world.has(80)
        told += await shop.publish(_events(10, tenant_id="other"))
        await world.has(90)
    found = await world.events()
    assert {event.event_id: _as_told(event) for event in found} == {event.event_id: _as_told(event) for event in told}
    assert {event.service_id for event in found} == set(SERVICES)
    streams: dict[Any, list[RecordedEvent]] = {}
    for event in found:
        streams.setdefault(event.stream, []).append(event)
    for stream, events in streams.items():  # both services write to streams of one name
        assert [event.version for event in events] == list(range(1, len(events) + 1)), stream
        for service in SERVICES:
            mine = [event.payload["n"] for event in events if event.service_id == service]
            assert mine == sorted(mine)


async def test_a_trace_shows_all_services_and_tenants_stay_apart(world: Central) -> None:
    shop, stock = world.services
    [placed] = await shop.publish(_events(1))
    await stock.publish(_events(1, trace=placed.trace.child(), correlation_id=placed.correlation_id))
    await stock.publish(_events(1, tenant_id="other", trace=placed.trace.child()))
    async with world.collector():
        await world.has(3)
    seen = await world.store.query(EventFilter(tenant_id="acme", trace_id=placed.trace_id))
    assert [event.service_id for event in seen] in (["shop", "stock"], ["stock", "shop"])
    with pytest.raises(TenantRequired):  # as in every log
        await world.store.query(trace_id=placed.trace_id)
    everybody = EventFilter(tenant_id=ALL_TENANTS, trace_id=placed.trace_id)
    assert len(await world.store.query(everybody)) == 3


async def test_topics_that_come_later_are_collected_and_others_are_not(world: Central, soma_kafka: KafkaHandle) -> None:
    shop, _ = world.services
    for name in ("letters", "more"):
        soma_kafka.create_topic(Topic(world.prefix + name, partitions=1))
    [placed] = await shop.publish(_events(1))
    async with world.collector(without=[world.prefix + "letters"]) as collector:
        await world.has(1)
        late = world.prefix + "late"
        soma_kafka.create_topic(Topic(late, partitions=2))
        async with Soma(replace(shop.config, service_id="late", topic=late)) as soma:
            await soma.publish(_events(3))  # the log is shop's; its relay brings them to their topic
            await world.has(4)
        stats = collector.stats()
        assert stats is not None
        assert {name for name, _ in stats.partitions} == {
            f"{world.prefix}{name}" for name in (*SERVICES, "more", "late")
        }
    assert (await world.events())[0].event_id == placed.event_id


async def test_killed_collectors_lose_and_repeat_nothing(world: Central) -> None:
    shop, stock = world.services
    told: list[RecordedEvent] = []
    for _ in range(4):
        told += await shop.publish(_events(300))
        told += await stock.publish(_events(300))
        with world.process() as process:
            await world.has(len(told) - 450)
            process.send_signal(signal.SIGKILL)
            process.wait()
    with world.process() as process:
        told += await shop.publish(_events(10))
        await world.has(len(told))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    found = [event.event_id for event in await world.events()]
    assert len(found) == len(set(found))
    assert set(found) == {event.event_id for event in told}


async def test_garbage_becomes_a_letter_and_keeps_nothing_waiting(world: Central) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=world.bootstrap)
    await producer.start()
    try:
        for value in (b"\xff\x00 no event", b"{}", b"[" * 5000, None):
            await producer.send_and_wait(f"{world.prefix}shop", value, key=b"acme:default:bad")
    finally:
        await producer.stop()
    await world.services[0].publish(_events(20))
    async with world.collector():
        await world.has(20)

        async def buried() -> bool:
            return (await world.pool.fetch("SELECT count(*) FROM soma.dead_letters"))[0][0] == 4

        assert await eventually(buried, within=60)


async def test_the_database_goes_away_and_comes_back(world: Central, databases: list[str]) -> None:
    shop, _ = world.services
    async with world.collector():
        await shop.publish(_events(50))
        for _ in range(5):
            await world.cut()
            await shop.publish(_events(50))
        await world.has(300)
    assert len({event.event_id for event in await world.events()}) == 300


def test_what_it_cannot_do_is_said() -> None:
    from soma_common.collector.collecting import CollectorSettings

    for wrong in ({"prefix": ""}, {"without": "soma.x"}, {"look_every": 0}):
        with pytest.raises(ConfigurationError, match="settings cannot be"):
            CollectorSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "words", "told"),
    [
        ({}, [], "The central log has no database"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://u@127.0.0.1:1/x"}, [], "There is no Kafka in standalone mode"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://u@127.0.0.1:1/x"}, ["--from-log", "nonsense"], "Cure:"),
        ({"SOMASTACK_POSTGRES_DSN": "postgresql://u@127.0.0.1:1/x"}, ["--look-every", "-1"], "--look-every"),
    ],
)
def test_the_command_says_what_is_missing(env: dict[str, str], words: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "soma_common.cli.main", "collect", *words], env={**os.environ, **env}, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


async def test_two_share_the_work(world: Central) -> None:
    shop, stock = world.services
    async with world.collector(), world.collector():
        await asyncio.gather(shop.publish(_events(200)), stock.publish(_events(200)))
        await world.has(400)
    assert len({event.event_id for event in await world.events()}) == 400


async def test_probes_show_its_consumer(world: Central) -> None:
    shop, _ = world.services
    async with world.collector() as collector, Probes([collector], world.pool, port=0) as probes:
        await shop.publish(_events(20))
        await world.has(20)
        await eventually(lambda: probes.health().ready)
        figures = {metric.name: metric.value for metric in probes.metrics() if metric.labels.get("consumer")}
        assert figures["soma_consumer_applied_total"] == 20
        assert probes.health().details["collector"] == {"away": None}
        assert probes.health().details["consumers"]["collector"]["live"]


async def test_probes_say_what_it_waits_for(databases: list[str]) -> None:
    async with Central(databases[-1], "127.0.0.1:1", "soma.", []) as alone, alone.collector() as collector:
        probes = Probes([collector], alone.pool, port=None)
        assert not probes.health().ready
        await eventually(lambda: "127.0.0.1:1" in str(probes.health().details["collector"]["away"]))
        assert (probes.health().live, probes.health().ready) == (True, False)


async def test_the_command_serves_them(world: Central) -> None:
    port = free_port()

    def told() -> dict[str, Any]:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as answer:
            return dict(json.load(answer))
        return {}

    shop, _ = world.services
    await shop.publish(_events(1))
    with world.process("--health-port", str(port)) as process:
        await eventually(lambda: bool(told().get("ready")), within=60)
        assert "collector" in told()["consumers"]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
