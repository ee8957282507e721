"""Sagas that are stuck: their letters, and what people do to them."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from soma_common.dlq import verbs as letters
from soma_common.dlq.filters import LetterFilter
from soma_common.dlq.models import Letter
from soma_common.errors import (
    OutcomeUnknown,
    SagaNotFound,
    SagaStuck,
    StepRefused,
    ValidationError,
    WrongSagaState,
)
from soma_common.retry import Backoff
from soma_common.sagas.models import Saga, SagaStatus, SagaStep, UndoPolicy, Unknown, with_compensation
from tests.saga_support import TENANT, Sagas, has_come_to, told, undone
from tests.waiting import until

SOON = Backoff(base=0.001, maximum=0.01)
QUICK = UndoPolicy(max_retries=1, retry=SOON)


class World:
    """What is outside of the database; broken until somebody mends it."""

    def __init__(self) -> None:
        self.broken, self.calls = True, list[str]()

    def saga(self, *, pivot: bool = False) -> Saga:
        """Three steps. Behind the pivot, or on the way back, the first one is broken."""

        async def undo(number: int) -> None:
            self.calls.append("undo")
            if self.broken:
                raise ConnectionError("the undo is broken")

        @with_compensation(undo)
        async def act(number: int) -> str:
            return "acted"

        async def middle(number: int) -> None: ...

        async def last(number: int) -> str:
            self.calls.append("last")
            if self.broken:
                raise StepRefused("the last is broken")
            return "done"

        first = SagaStep(act, undo=QUICK)
        return Saga(f"stuck-{uuid4().hex[:8]}", int, first, SagaStep(middle, pivot=pivot), last)


async def letters_of(sagas: Sagas, saga_id: UUID) -> list[Letter]:
    return list((await letters.find(sagas.pool, LetterFilter(tenant_id=TENANT, event_id=saga_id))).letters)


async def test_a_compensation_that_fails_for_good_leaves_the_saga_stuck_with_a_letter(sagas: Sagas) -> None:
    world = World()
    saga = world.saga()
    async with sagas.worker(saga):
        view = await sagas.ended(saga_id := await sagas.start(saga, 1))
        with pytest.raises(SagaStuck, match="because of act: .*ConnectionError the undo is broken"):
            await sagas.orchestrator.result(saga_id)
    assert view.status is SagaStatus.STUCK
    assert told(view.journal)[-4:] == ["turned", "undo-retrying act", "undo-failed act", "stuck"]
    (letter,) = await letters_of(sagas, saga_id)
    assert (letter.status, letter.stage, letter.consumer) == ("dead", "undo", f"saga:{saga.name}")
    assert letter.message == "the undo is broken"
    full = await letters.show(sagas.pool, letter.letter_id)
    assert full.record.value == b"1"
    assert full.stack is not None
    assert "the undo is broken" in full.stack
    assert (await letters.history(sagas.pool, letter.letter_id))[0].what == "dead"


async def test_a_retry_goes_on_where_it_is_stuck_and_settles_the_letter(sagas: Sagas) -> None:
    world = World()
    saga = world.saga()
    async with sagas.worker(saga):
        await sagas.ended(saga_id := await sagas.start(saga, 1))
        await sagas.orchestrator.retry(saga_id, who="ann", why="is it mended?")
        view = await until_stuck_again(sagas, saga_id, 2)
        assert [entry.what for entry in view.journal if entry.who == "ann"] == ["retry"]
        world.broken = False
        (open_letter,) = [found for found in await letters_of(sagas, saga_id) if found.status == "dead"]
        assert await letters.retry(sagas.pool, open_letter.letter_id, who="bob", why="mended")
        view = await sagas.ended(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert undone(view) == ["act"]
    assert world.calls.count("undo") == 2 + 2 + 1
    assert [found.status for found in await letters_of(sagas, saga_id)] == ["resolved", "resolved"]
    history = await letters.history(sagas.pool, open_letter.letter_id)
    assert [(entry.what, entry.who, entry.why) for entry in history][1:] == [("resolved", "bob", "mended")]


async def test_a_retry_of_the_undo_of_what_nobody_knows_is_an_undo(sagas: Sagas) -> None:
    world = World()

    async def act(number: int) -> None:
        raise OutcomeUnknown("the answer was lost")

    async def undo(number: int) -> None:
        world.calls.append("undo")
        if world.broken:
            raise StepRefused("the undo is broken")

    saga = Saga("lost", int, SagaStep(act, undo, unknown=Unknown.COMPENSATE, undo=QUICK))
    async with sagas.worker(saga):
        await sagas.ended(saga_id := await sagas.start(saga, 1))
        world.broken = False
        await sagas.orchestrator.retry(saga_id, who="ann", why="mended")
        await until(lambda: _has_ended(sagas, saga_id))
    view = await sagas.orchestrator.get_saga(saga_id)
    assert told(view.journal) == [
        "begun act", "unknown act", "failed act", "turned", "undo-failed act", "stuck", "retry act", "undone act", "ended",
    ]  # fmt: skip
    assert world.calls == ["undo", "undo"]


async def _has_ended(sagas: Sagas, saga_id: UUID) -> bool:
    return (await sagas.orchestrator.get_saga(saga_id)).status is SagaStatus.COMPENSATED


async def until_stuck_again(sagas: Sagas, saga_id: UUID, times: int) -> Any:
    async def look() -> Any:
        view = await sagas.orchestrator.get_saga(saga_id)
        return view if told(view.journal).count("stuck") == times else None

    return await until(look)


async def test_an_undo_that_was_done_by_hand_is_skipped_or_resolved(sagas: Sagas) -> None:
    for verb in ("skip", "resolve"):
        world = World()
        saga = world.saga()
        async with sagas.worker(saga):
            await sagas.ended(saga_id := await sagas.start(saga, 1))
            if verb == "skip":
                await sagas.orchestrator.skip(saga_id, who="ann", why="nothing to undo")
            else:
                await sagas.orchestrator.resolve(saga_id, happened=True, who="ann", why="by hand")
            view = await sagas.ended(saga_id)
        assert view.status is SagaStatus.COMPENSATED
        last = view.journal[-2]
        assert (last.what, last.who) == ("undo-skipped" if verb == "skip" else "undone", "ann")
        assert [found.status for found in await letters_of(sagas, saga_id)] == ["resolved"]


async def test_behind_the_pivot_there_is_no_way_back(sagas: Sagas) -> None:
    world = World()
    saga = world.saga(pivot=True)
    async with sagas.worker(saga):
        view = await sagas.ended(saga_id := await sagas.start(saga, 1))
        assert view.status is SagaStatus.STUCK
        assert (view.reason, view.error) == ("last", "the last is broken")
        (letter,) = await letters_of(sagas, saga_id)
        assert letter.stage == "handle"
        with pytest.raises(WrongSagaState, match="behind its pivot"):
            await sagas.orchestrator.compensate(saga_id, reason="customer cancelled")
        world.broken = False
        await sagas.orchestrator.retry(saga_id, why="mended")
        assert await sagas.orchestrator.result(saga_id) == "done"
    assert (await sagas.orchestrator.get_saga(saga_id)).error is None


async def test_nobody_knows_and_a_person_says_what_happened(sagas: Sagas) -> None:
    calls = list[str]()

    async def refund(number: int, paid: str | None) -> None:
        calls.append(f"refund {paid}")

    @with_compensation(refund)
    async def pay(number: int) -> str:
        raise OutcomeUnknown("the bank fell silent")

    async def end(paid: str) -> str:
        return f"{paid} and ended"

    saga = Saga("ask", int, SagaStep(pay, unknown=Unknown.ASK), end)
    async with sagas.worker(saga):
        view = await sagas.ended(saga_id := await sagas.start(saga, 1))
        assert view.status is SagaStatus.STUCK
        assert told(view.journal) == ["begun pay", "unknown pay", "stuck"]
        with pytest.raises(ValidationError, match="The result of pay"):
            await sagas.orchestrator.resolve(saga_id, happened=True, result=17, why="the bank says so")
        await sagas.orchestrator.resolve(saga_id, happened=True, result="paid", who="ann", why="the bank says so")
        assert await sagas.orchestrator.result(saga_id) == "paid and ended"
        second = await sagas.start(saga, 1)
        await sagas.ended(second)
        await sagas.orchestrator.resolve(second, happened=False, who="ann", why="the bank says no")
        view = await sagas.ended(second)
    assert view.status is SagaStatus.COMPENSATED
    assert calls == []  # it did not happen: there is nothing to undo


async def test_a_step_whose_result_others_need_is_not_skipped(sagas: Sagas) -> None:
    async def act(number: int) -> str:
        raise OutcomeUnknown

    async def free_of_it(number: int) -> float:
        raise OutcomeUnknown

    async def end(acted: str) -> str:
        return acted

    ask = {"unknown": Unknown.ASK}
    inner = Saga("inner", int, SagaStep(free_of_it, **ask), SagaStep(act, **ask), end)
    saga = Saga("needs", int, inner)
    async with sagas.worker(saga):
        view = await sagas.ended(saga_id := await sagas.start(saga, 1))
        assert view.reason == "inner/free-of-it"
        await sagas.orchestrator.skip(saga_id, why="not now")
        await until(lambda: has_come_to(sagas, saga_id, "stuck"))
        await until(lambda: has_come_to(sagas, saga_id, "unknown inner/act"))
        await sagas.ended(saga_id)
        with pytest.raises(WrongSagaState, match="cannot go on without the result of inner/act"):
            await sagas.orchestrator.skip(saga_id, why="not now")
        await sagas.orchestrator.resolve(saga_id, happened=True, result="acted", why="so it is")
        assert await sagas.orchestrator.result(saga_id) == "acted"


async def test_unknown_and_compensate_undoes_the_step_itself(sagas: Sagas) -> None:
    calls = list[str]()

    async def refund(number: int, paid: str | None) -> None:
        calls.append(f"refund {paid}")

    async def pay(number: int) -> str:
        raise OutcomeUnknown("the bank fell silent")

    saga = Saga("undo-unknown", int, SagaStep(pay, refund, unknown=Unknown.COMPENSATE))
    view = await sagas.run(saga, 1)
    assert told(view.journal) == ["begun pay", "unknown pay", "failed pay", "turned", "undone pay", "ended"]
    assert calls == ["refund None"]


async def test_what_cannot_be_done_is_refused_by_name(sagas: Sagas) -> None:
    world = World()
    world.broken = False
    saga = world.saga()
    o = sagas.orchestrator
    async with sagas.worker(saga):
        await sagas.ended(ended := await sagas.start(saga, 1))
    waiting = await sagas.start(saga, 1)
    for verb in (o.retry, o.skip):
        with pytest.raises(WrongSagaState, match="is completed, not stuck"):
            await verb(ended, why="why not")
        with pytest.raises(WrongSagaState, match="is pending, not stuck"):
            await verb(waiting, why="why not")
        with pytest.raises(SagaNotFound, match="There is no saga"):
            await verb(uuid4(), why="why not")
        with pytest.raises(ValidationError, match="has a reason"):
            await verb(ended, why=" ")
        with pytest.raises(ValidationError, match="is not an id"):
            await verb("'; DROP TABLE soma.sagas", why="why not")
    for ask in (o.compensate, o.cancel):
        with pytest.raises(WrongSagaState, match="cannot turn around: it is completed"):
            await ask(ended, reason="too late")
        with pytest.raises(SagaNotFound):
            await ask(uuid4(), reason="unknown")
    with pytest.raises(WrongSagaState, match="takes no signal any more"):
        await o.signal(ended, "go")
    for unknown in (o.get_saga(uuid4()), o.result(uuid4()), o.signal(uuid4(), "go")):
        with pytest.raises(SagaNotFound):
            await unknown


async def test_a_letter_of_a_saga_goes_with_the_saga(sagas: Sagas) -> None:
    world = World()
    view = await sagas.run(world.saga(), 1)
    (letter,) = await letters_of(sagas, view.saga_id)
    with pytest.raises(ValidationError, match="settled with its saga"):
        await letters.discard(sagas.pool, letter.letter_id, who="ann", reason="away with it")
    full = await letters.show(sagas.pool, letter.letter_id)
    with pytest.raises(ValidationError, match="cannot be changed"):
        await letters.edit(sagas.pool, full, {"n": 2}, who="ann")
    assert await letters.can_retry(sagas.pool, letter.letter_id)
