"""Handlers inside of Django's transaction: models take part, hooks run after the commit, connections are Django's."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from django.db import IntegrityError, connections, models, transaction

from soma_common import Event, Soma, SomaConfig
from soma_common.config import DeployMode
from soma_common.consumer.settings import ConsumerSettings
from tests.integration.consumer.flavours import apply, execute, flavour_of
from tests.waiting import until


@pytest.fixture
def django_only(soma_database: str) -> Any:
    with flavour_of("django", soma_database) as made:
        yield made


def _model() -> type[models.Model]:
    """Of the table ``total``; made when Django is set up."""

    class Total(models.Model):
        key = models.TextField(primary_key=True)
        n = models.BigIntegerField()

        class Meta:
            app_label = "tests"
            db_table = "total"
            managed = False

        def __str__(self) -> str:
            return self.key

    return Total


async def test_models_commit_with_the_event_or_not_at_all(world: Any, django_only: Any, settings: Any) -> None:
    total, using = _model(), django_only.alias

    def handle(event: Any, ctx: Any) -> None:
        n = event.payload["n"]
        total.objects.using(using).create(key=str(n), n=n)
        assert ctx.tx is connections[using]
        assert ctx.tx.in_atomic_block
        try:
            with transaction.atomic(using=using):
                total.objects.using(using).create(key=str(n), n=n)
        except IntegrityError:
            pass
        apply(event, ctx)
        if n == 7:
            total.objects.using(using).create(key="6", n=6)

    events = await world.publish(20, keys=20)
    async with world.log_worker(handle, connect=django_only.connect, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 20)
    await world.check([event for event in events if event.payload["n"] != 7])
    rows = await world.pool.fetch("SELECT n FROM total ORDER BY n")
    assert [row[0] for row in rows] == [n for n in range(20) if n != 7]
    (letter,) = await world.letters()
    assert letter.letter.error_type == "django.db.utils.IntegrityError"


async def test_hooks_run_after_the_commit_and_do_no_harm(
    world: Any, django_only: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    threads = set()

    def handle(event: Any, ctx: Any) -> None:
        apply(event, ctx)
        n = event.payload["n"]

        def hook() -> None:
            assert not connections[django_only.alias].in_atomic_block
            seen.append(n)
            threads.add(threading.get_ident())
            if n == 4:
                raise ConnectionError("the mail server is away")

        transaction.on_commit(hook, using=django_only.alias)
        if n == 2:
            raise ValueError("bad luck")

    events = await world.publish(6, keys=6)
    given = settings(lanes=1, batch=1)
    with caplog.at_level(logging.ERROR):
        async with world.log_worker(handle, connect=django_only.connect, settings=given) as worker:
            await until(lambda: worker.stats().tally.settled == 6)
    assert sorted(seen) == [0, 1, 3, 4, 5]
    assert threading.get_ident() not in threads
    assert [record for record in caplog.records if "on_commit" in record.getMessage()]
    await world.check([event for event in events if event.payload["n"] != 2])


@pytest.mark.parametrize(("age", "expected"), [(0, 1), (None, 1), (1, 2)])
async def test_connections_are_renewed_when_django_would(world: Any, age: int | None, expected: int) -> None:
    """An age of 0 means the end of a request; a consumer has none, and keeps its connection."""
    backends: list[int] = []

    def handle(event: Any, ctx: Any) -> None:
        backends.append(execute(ctx.tx, "SELECT pg_backend_pid()")[0][0])
        apply(event, ctx)

    given = ConsumerSettings(lanes=1, redrives=0)
    with flavour_of("django", world.dsn, CONN_MAX_AGE=age) as flavour:
        async with world.log_worker(handle, connect=flavour.connect, settings=given):
            await world.publish(1)
            await world.applied(1)
            opened = await world.pool.fetch("SELECT backend_start FROM pg_stat_activity WHERE pid = $1", backends[0])
            older = "SELECT clock_timestamp() > $1::timestamptz + interval '1.2 seconds'"

            async def is_old() -> bool:
                return bool((await world.pool.fetch(older, opened[0][0]))[0][0])

            await until(is_old)
            await world.publish(1, start=1)
            await world.applied(2)
    assert len(set(backends)) == expected


async def test_other_databases_of_a_handler_are_not_kept_open_for_ever(world: Any, django_only: Any) -> None:
    """What Django does at the end of a request is done between batches."""
    with flavour_of("django", world.dsn) as other:
        seen: list[Any] = []

        def handle(event: Any, ctx: Any) -> None:
            before = connections[other.alias].connection
            seen.append(before)
            execute(connections[other.alias], "SELECT 1")
            apply(event, ctx)

        given = ConsumerSettings(lanes=1, redrives=0, batch=1)
        async with world.log_worker(handle, connect=django_only.connect, settings=given):
            await world.publish(3)
            await world.applied(3)
        assert seen == [None, None, None]
        left = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query = 'SELECT 1'"

        async def none_left() -> bool:
            return not await world.pool.fetch(left)

        await until(none_left)


async def test_an_application_names_its_database_of_django(world: Any, django_only: Any) -> None:
    """From the declaration to the replay: the whole way of a user."""
    config = SomaConfig(mode=DeployMode.STANDALONE, service_id="shop", postgres_dsn=world.dsn)
    for django, kind in ((django_only.alias, "DatabaseWrapper"), (None, "Connection")):
        soma, seen = Soma(config, django=django), []

        @soma.handler("order.paid", consumer=f"by {kind}".lower().replace(" ", "-"))
        def handle(event: Any, ctx: Any, seen: list[Any] = seen) -> None:
            seen.append((type(ctx.tx).__name__, event.payload["n"]))
            apply(event, ctx)
            if event.payload["n"] == 2:
                ctx.publish(Event(event_type="order.seen", payload={}, tenant_id="acme", aggregate_id="s"))

        async with soma:
            start = await world.count()
            given = {"event_type": "order.paid", "tenant_id": "acme", "aggregate_id": "a"}
            if not start:
                await soma.publish([Event(payload={"n": n}, **given) for n in range(3)])
            await soma.drain()
            assert seen == [(kind, n) for n in range(3)]
            assert await world.count() == start + 3
    assert len(await world.store.query(tenant_id="acme", event_type="order.seen")) == 2
