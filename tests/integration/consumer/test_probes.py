"""What a process tells about its consumers: by HTTP, from outside, while things go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Partition, Record
from soma_common.consumer.worker import ConsumerWorker
from soma_common.errors import ConfigurationError
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.probes import Probes
from soma_common.testing.lane.ports import free_port
from soma_common.testing.proxy import Proxy, proxy_to
from tests.waiting import until

PROGRAM = Path(__file__).with_name("probed.py")
PATIENCE = 90.0  # seconds, on a machine with more to do


def ask(port: int | None, path: str) -> tuple[int, str]:
    """Status and body of a page; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


async def asked(port: int | None, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(ask, port, path)


def sample(text: str, name: str, **labels: str) -> float | None:
    """The value of a sample with these labels, and perhaps others."""
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            return float(found[2])
    return None


async def reaches(port: int | None, name: str, value: float, **labels: str) -> None:
    async def there() -> bool:
        return sample((await asked(port, "/metrics"))[1], name, **labels) == value

    await until(there, within=PATIENCE, what=f"{name}{labels} = {value}")


async def answers(port: int | None, path: str, status: int) -> None:
    async def there() -> bool:
        return (await asked(port, path))[0] == status

    await until(there, within=PATIENCE, what=f"{path} answers {status}")


@pytest.fixture
def process(soma_database: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SOMA_DEPLOY_MODE": "standalone",
           "SOMASTACK_POSTGRES_DSN": soma_database, "SOMA_HEALTH_PORT": str(port)}  # fmt: skip
    one = subprocess.Popen([sys.executable, str(PROGRAM)], env=env, stderr=subprocess.DEVNULL)
    yield one, port
    one.kill()
    one.wait()


async def test_a_process_tells_what_it_does(world: Any, process: tuple[subprocess.Popen[bytes], int]) -> None:
    one, port = process
    await answers(port, "/health/ready", 200)
    status, body = await asked(port, "/health/live")
    assert status == 200
    assert json.loads(body)["consumers"]["billing"]["partitions"] == 8
    await world.publish(30)
    await world.publish(1, start=-1)
    await reaches(port, "soma_consumer_applied_total", 30, consumer="billing")
    await reaches(port, "soma_consumer_dead_total", 1, consumer="billing")
    await reaches(port, "soma_consumer_in_flight", 0, consumer="billing")
    # A name is a name, whatever is in it.
    await reaches(port, "soma_consumer_applied_total", 31, consumer=r"odd \"name\"\n")
    text = (await asked(port, "/metrics"))[1]
    assert sample(text, "soma_consumer_live", consumer="billing") == 1
    assert sample(text, "soma_consumer_lag", consumer="billing", partition="0") is not None
    await reaches(port, "soma_dead_letters", 1, consumer="billing", status="dead")
    age = sample((await asked(port, "/metrics"))[1], "soma_dead_letters_oldest_seconds", status="dead")
    assert age is not None
    assert 0 < age < 600
    assert (await asked(port, "/health/whatever"))[0] == 404
    one.terminate()
    assert await asyncio.to_thread(one.wait, 60) == 0
    assert (await asked(port, "/health/live"))[0] == 0


async def test_the_samples_have_one_line_each(world: Any) -> None:
    """Two workers of one consumer count as one: Prometheus refuses a page with a sample twice."""
    workers = [world.log_worker(), world.log_worker(), world.log_worker(consumer="journal")]
    async with Probes(workers, world.pool, port=0, host="127.0.0.1") as probes, workers[0], workers[1], workers[2]:
        await world.publish(20)
        await reaches(probes.port, "soma_consumer_applied_total", 20, consumer="billing")
        await reaches(probes.port, "soma_consumer_partitions", 8, consumer="billing")
        lines = [line for line in (await asked(probes.port, "/metrics"))[1].splitlines() if not line.startswith("#")]
        series = [line.rpartition(" ")[0] for line in lines]
        assert len(series) == len(set(series))


async def test_a_port_that_is_taken_is_named(world: Any) -> None:
    async with Probes([], world.pool, port=0, host="127.0.0.1") as first:
        with pytest.raises(ConfigurationError, match=str(first.port)):
            await Probes([], world.pool, port=first.port, host="127.0.0.1").start()


@asynccontextmanager
async def through_a_proxy(world: Any, **settings: Any) -> AsyncIterator[tuple[Proxy, ConsumerWorker, Probes]]:
    """A worker whose connections can be harmed; the probes count letters by the same way."""
    with proxy_to(world.dsn) as proxy:
        pool = Pool(PoolSettings(proxy.through(world.dsn), timeout=2.0))
        source = LogSource(pool, "billing", LogSettings(most_idle=0.02, lease=5.0))
        given = ConsumerSettings(redrive_every=0.05, **settings)
        worker = world.worker(source, settings=given)
        worker._pool = pool
        try:
            async with pool, Probes([worker], pool, host="127.0.0.1", letters_every=0.2) as probes, worker:
                yield proxy, worker, probes
        finally:
            proxy.forward()


async def test_a_consumer_without_its_database_is_live_and_not_ready(world: Any) -> None:
    async with through_a_proxy(world, stuck=1.0) as (proxy, worker, probes):
        await world.publish(10)
        await world.applied(10)
        await answers(probes.port, "/health/ready", 200)
        proxy.refuse()
        await answers(probes.port, "/health/ready", 503)
        await until(lambda: worker.stats().idle > 4.0, within=PATIENCE)  # longer than three times stuck
        status, body = await asked(probes.port, "/health/live")
        assert status == 200, body
        assert json.loads(body)["consumers"]["billing"]["away"]
        assert sample((await asked(probes.port, "/metrics"))[1], "soma_consumer_ready") == 0
        proxy.forward()
        await answers(probes.port, "/health/ready", 200)
        await world.publish(10, start=10)
        await world.applied(20, within=PATIENCE)
        assert worker.stats().tally.stalls == 0


async def test_connections_that_fall_silent_are_given_up(world: Any, settings: Callable[..., Any]) -> None:
    """No reset, no end: whoever waits for an answer on these connections would wait for ever."""
    events = await world.publish(40)
    async with through_a_proxy(world, stuck=1.5) as (proxy, worker, probes):
        await world.applied(1, within=PATIENCE)
        for start in (40, 80):
            # The answer of a COMMIT that is lost here would make its events count as repeated.
            await until(lambda start=start: worker.stats().tally.applied == start, within=PATIENCE)
            before = worker.stats().tally.stalls
            assert proxy.silence() > 0
            events += await world.publish(40, start=start)
            await world.applied(start + 40, within=PATIENCE)
            assert worker.stats().tally.stalls > before
        await answers(probes.port, "/health/ready", 200)
        await reaches(probes.port, "soma_consumer_applied_total", 120)
        await until(lambda: not worker.stats().in_flight)
    await world.check(events)


class Hanging(LogSource):
    """A source that stops answering."""

    hangs = False

    async def fetch(self, most: int, without: Collection[Partition] = ()) -> Sequence[Record]:
        if self.hangs:
            await asyncio.Event().wait()
        return await super().fetch(most, without)


async def test_a_source_that_hangs_is_started_anew_and_ends_the_liveness(world: Any) -> None:
    source = Hanging(world.pool, "billing", LogSettings(most_idle=0.02))
    worker = world.worker(source, settings=ConsumerSettings(stuck=0.7))
    async with Probes([worker], world.pool, host="127.0.0.1") as probes, worker:
        events = await world.publish(10)
        await world.applied(10)
        await answers(probes.port, "/health/live", 200)
        source.hangs = True
        await until(lambda: worker.stats().tally.stalls >= 1, within=PATIENCE)
        await answers(probes.port, "/health/ready", 503)
        await answers(probes.port, "/health/live", 503)
        source.hangs = False
        events += await world.publish(10, start=10)
        await world.applied(20, within=PATIENCE)
        await answers(probes.port, "/health/live", 200)
        await answers(probes.port, "/health/ready", 200)
    await world.check(events)


async def test_an_idle_consumer_stays_live(world: Any) -> None:
    worker = world.log_worker(settings=ConsumerSettings(stuck=0.5))
    async with worker:
        await world.publish(5)
        await world.applied(5)
        await asyncio.sleep(2.5)  # far beyond three times stuck; nothing is to happen
        assert worker.stats().live
        assert worker.stats().ready
        assert worker.stats().tally.stalls == 0


async def test_a_slow_handler_is_no_stall(world: Any) -> None:
    async def slow(event: Any, ctx: Any) -> None:
        await asyncio.sleep(2.5)

    worker = world.log_worker(slow, settings=ConsumerSettings(stuck=0.5, timeout=30.0))
    async with worker:
        await world.publish(1)
        await until(lambda: worker.stats().tally.applied == 1, within=PATIENCE)
        assert worker.stats().tally.stalls == 0
        assert worker.stats().live
