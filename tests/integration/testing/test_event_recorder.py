"""A recorder sees what anybody committed since it began, in the order of the log, and nothing else."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from soma_common import Event, Payload, PayloadModels, Soma, SomaConfig
from soma_common.errors import ConfigurationError
from soma_common.testing import EventRecorder, make_event
from tests.sessions import cut_all


class Placed(Payload, event_type="order.placed"):
    order: str
    cents: int


class Billed(Payload, event_type="order.billed"):
    order: str


def _soma(dsn: str) -> Soma:
    soma = Soma(SomaConfig(postgres_dsn=dsn), models=PayloadModels(Placed, Billed))

    @soma.handler(Placed)
    async def bill(event: Any, ctx: Any) -> None:
        ctx.publish(make_event(Billed(order=event.payload.order)))

    return soma


async def test_what_was_recorded_before_does_not_count(soma_database: str) -> None:
    async with _soma(soma_database) as soma:
        await soma.publish(make_event(Placed(order="o-0", cents=1)))
        async with EventRecorder(soma) as recorded:
            assert await recorded.types() == []
            await soma.publish([make_event(Placed(order=f"o-{n}", cents=n)) for n in (1, 2)])
            assert await recorded.types() == ["order.placed"] * 2
            event = await recorded.one(Placed, order="o-2")
            assert event.payload == Placed(order="o-2", cents=2)
            assert [each.payload.order for each in await recorded.events("order.placed")] == ["o-1", "o-2"]
            assert len(await recorded.events(Placed, cents=lambda cents: cents > 1)) == 1
            await recorded.none(Billed)
            await soma.drain()
            assert await recorded.types() == ["order.placed"] * 2 + ["order.billed"] * 3
        assert len(await recorded.events()) == 5


async def test_what_is_rolled_back_or_begun_before_is_told_by_its_commit(soma_database: str) -> None:
    async with _soma(soma_database) as soma, soma.pool.connection() as mine:
        early = mine.transaction()
        await early.start()
        await soma.publish(make_event(Placed(order="early", cents=1)), tx=mine)
        async with EventRecorder(soma) as recorded:
            await soma.publish(make_event(Placed(order="late", cents=1)))
            assert [each.payload.order for each in await recorded.events()] == ["late"]
            await early.commit()  # a lower position than that of the other
            assert {each.payload.order for each in await recorded.events()} == {"late", "early"}
            with pytest.raises(ZeroDivisionError):
                async with soma.transaction() as tx:
                    tx.publish(make_event(Placed(order="never", cents=1)))
                    _ = 1 / 0
            await recorded.none(Placed, order="never")


async def test_another_process_is_waited_for(soma_database: str) -> None:
    program = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.integration.testing.test_event_recorder import _soma, Placed, make_event\n"
        "async def main():\n"
        "    async with _soma(sys.argv[1]) as soma:\n"
        "        await soma.publish([make_event(Placed(order=str(n), cents=n)) for n in range(3)])\n"
        "asyncio.run(main())\n"
    )
    async with _soma(soma_database) as soma, EventRecorder(soma) as recorded:
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", program, soma_database, ".")
        found = await recorded.wait_for(Placed, count=3)
        assert [event.payload.cents for event in found] == [0, 1, 2]
        assert await other.wait() == 0


async def test_failures_list_what_there_was(soma_database: str) -> None:
    async with _soma(soma_database) as soma, EventRecorder(soma) as recorded:
        with pytest.raises(AssertionError, match=r"0 events are order.placed, not 1. Nothing was recorded"):
            await recorded.one(Placed)
        await soma.publish([make_event(Placed(order="o-1", cents=n), aggregate_id="o-1") for n in (1, 2)])
        with pytest.raises(AssertionError, match=r"2 events are order.placed with order='o-1', not 1.(.|\n)*cents=2"):
            await recorded.one(Placed, order="o-1")
        with pytest.raises(AssertionError, match="2 events are order.placed"):
            await recorded.none(Placed)
        with pytest.raises(
            AssertionError, match=r"recording 3 of order.placed did not hold within 0.2 s: 2 events(.|\n)*Recorded: 2"
        ):
            await recorded.wait_for(Placed, count=3, within=0.2)


async def test_a_tenant_of_its_own_and_types_without_a_model(soma_database: str) -> None:
    async with _soma(soma_database) as soma, EventRecorder(soma, tenant_id="acme") as recorded:
        loose = Event(payload={"size": 3}, event_type="box.packed", tenant_id="acme", aggregate_id="b")
        await soma.publish([make_event(Placed(order="o-1", cents=1)), loose])
        event = await recorded.one("box.packed", size=3)
        assert event.payload == {"size": 3}
        assert await recorded.types() == ["box.packed"]


async def test_more_than_a_page_and_a_cut_connection(soma_database: str) -> None:
    async with _soma(soma_database) as soma, EventRecorder(soma) as recorded:
        await soma.publish([make_event(Placed(order="o", cents=n), aggregate_id="o") for n in range(2500)])
        assert [each.payload.cents for each in await recorded.events()] == list(range(2500))
        await cut_all(soma_database)
        await soma.publish(make_event(Billed(order="o")))
        assert len(await recorded.wait_for(Billed)) == 1


async def test_it_must_be_entered(soma_database: str) -> None:
    async with _soma(soma_database) as soma:
        with pytest.raises(ConfigurationError, match="has not begun"):
            await EventRecorder(soma).events()
