"""Signals to sagas: early, twice, wrong, and not at all."""

from __future__ import annotations

from soma_common.sagas.models import Saga, SagaStep, Signal
from tests.saga_support import Sagas, has_come_to, told
from tests.waiting import until


async def test_signals_come_early_twice_and_wrong(sagas: Sagas) -> None:
    async def after(number: int, go: str) -> str:
        return go

    saga = Saga("signals", int, Signal("go", str), after)
    o = sagas.orchestrator
    early = await sagas.start(saga, 1)
    assert await o.signal(early, "go", "first", signal_id="one")
    assert not await o.signal(early, "go", "first", signal_id="one")
    assert await o.signal(early, "go", "second")
    late = await sagas.start(saga, 1)
    async with sagas.worker(saga):
        assert await o.result(early) == "first"
        await until(lambda: has_come_to(sagas, late, "waiting go"))
        await o.signal(late, "go", 17)
        await o.signal(late, "come", "x")
        await o.signal(late, "go", "at last")
        assert await o.result(late) == "at last"


async def test_a_signal_that_does_not_come(sagas: Sagas) -> None:
    async def undo(number: int) -> None: ...

    async def act(number: int) -> None: ...

    async def after(number: int, go: str | None) -> str:
        return f"{go}"

    saga = Saga("never", int, SagaStep(act, undo), Signal("go", str, timeout_seconds=0.2), name_of_nothing)
    view = await sagas.run(saga, 1)
    assert told(view.journal) == ["done act", "waiting go", "failed go", "turned", "undone act", "ended"]
    assert view.error == "no signal go came within 0.2 s"
    optional = Saga("optional", int, Signal("go", str, timeout_seconds=0.2, optional=True), after)
    assert (await sagas.run(optional, 1)).result == "None"


async def name_of_nothing(number: int) -> None: ...
