"""Figures of sagas, replays, archives, appends and connections, as a process with a real database shows them."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from soma_common import Event, Saga, Soma, SomaConfig, with_compensation
from soma_common.errors import SomaError, StepRefused
from soma_common.events import tally
from soma_common.gauges import DatabaseGauges
from soma_common.health import Metric
from soma_common.replay.models import ReplayFilter
from soma_common.testing.lane.sql_tools import SqlTools
from soma_common.tracing.instruments import histogram
from tests import promtool
from tests.waiting import until


async def undo(number: int) -> None:
    if number == 2:
        raise StepRefused("it cannot be undone")


@with_compensation(undo)
async def do(number: int) -> None: ...


async def pay(number: int) -> None:
    if number:
        raise StepRefused("no")


SAGA = Saga("three", int, do, pay)


def event(number: int, **given: Any) -> Event:
    return Event(**({"payload": {}, "event_type": "a.b", "aggregate_id": str(number), "tenant_id": "t"} | given))


def values(metrics: Any, name: str) -> dict[tuple[str, ...], float]:
    return {tuple(m.labels.values()): m.value for m in metrics if m.name == name}


async def test_a_process_tells_of_its_sagas_and_appends(soma_database: str) -> None:
    soma = Soma(SomaConfig(service_id="shop", postgres_dsn=soma_database, pool_size=7), sagas=[SAGA])
    async with soma:
        worker = soma.saga_worker()
        async with soma.probes(worker, port=0) as probes, worker:
            await soma.publish([event(1), event(2)])
            with pytest.raises(SomaError):
                await soma.store.publish(event(1), expected_version=7)
            await asyncio.to_thread(publish_plainly, soma)
            ids = [await soma.sagas.start_saga(SAGA, number, tenant_id="t") for number in range(3)]

            async def ended() -> bool:
                views = [await soma.sagas.get_saga(each) for each in ids]
                return [view.status for view in views] == ["completed", "compensated", "stuck"]

            await until(ended, what="the ends of the sagas")
            shown = list(probes.metrics())
            page = await asyncio.to_thread(read, f"http://127.0.0.1:{probes.port}/metrics")
            health = await asyncio.to_thread(read, f"http://127.0.0.1:{probes.port}/health/ready")
    steps = values(shown, "soma_saga_steps_total")
    assert {key[1]: value for key, value in steps.items() if value} == {
        "done": 4.0, "failed": 2.0, "undone": 1.0, "undo-failed": 1.0,
    }  # fmt: skip
    turns = values(shown, "soma_saga_turns_total")
    assert turns == {("three", "turned"): 2.0, ("three", "stuck"): 1.0, ("three", "ended"): 2.0}
    assert values(shown, "soma_append_events_total") == {(): 3.0}
    assert values(shown, "soma_append_failed_total") == {(): 1.0}
    assert values(shown, "soma_append_duration_seconds_count") == {(): 2.0}
    assert values(shown, "soma_append_duration_seconds_bucket")["+Inf",] == 2.0
    assert values(shown, "soma_pool_size") == {(): 7.0}
    assert 1.0 <= values(shown, "soma_pool_connections")[()] <= 7.0
    promtool.run("check", "metrics", given=page)
    assert '"sagas"' in health


def publish_plainly(soma: Soma) -> None:
    with soma.sync_transaction() as tx:
        tx.publish(event(3))


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


async def test_what_a_database_holds_is_counted(soma_database: str) -> None:
    soma, sql = Soma(SomaConfig(service_id="shop", postgres_dsn=soma_database)), SqlTools.at(soma_database)

    @soma.handler("a.b", consumer="a")
    async def handle(event: Any, ctx: Any) -> None: ...

    async with soma:
        gauges = DatabaseGauges(soma.pool)
        assert list(gauges.metrics()) == []
        await gauges.count()
        assert [metric.name for metric in gauges.metrics()] == ["soma_database_counted_seconds"]
        await soma.publish(event(1))
        await soma.drain()
        async with soma.replays("a") as engine:
            await engine.start(ReplayFilter(tenant_id="t"))
        await soma.sagas.start_saga(SAGA, 1, tenant_id="t")
        sql.query("UPDATE soma.sagas SET wake_at = wake_at - interval '1 hour'")
        await gauges.count()
        shown: list[Metric] = list(gauges.metrics())
    assert values(shown, "soma_sagas") == {("three", "pending"): 1.0}
    assert 3600.0 <= values(shown, "soma_sagas_late_seconds")["three", "pending"] < 4000.0
    assert values(shown, "soma_replays") == {("a", "planned"): 1.0}
    assert values(shown, "soma_archives") == {}


def test_appends_are_recorded_by_opentelemetry_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr("opentelemetry.metrics.get_meter", provider.get_meter)
    monkeypatch.setattr(tally, "_record", histogram("soma.append.duration", "s", "Took.", tally.BOUNDS))
    known = tally.AppendTally()

    def many() -> None:
        for _ in range(500):
            with known.timed(2):
                pass

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (known.read().events, sum(known.read().classes)) == (4000, 2000)
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert (metric.name, metric.unit, point.count) == ("soma.append.duration", "s", 2000)  # type: ignore[union-attr]
    assert tuple(point.explicit_bounds) == tally.BOUNDS  # type: ignore[union-attr]
    provider.shutdown()
