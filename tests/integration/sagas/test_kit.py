"""The test kit does what it says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import pytest

from soma_common.errors import StepRefused, ValidationError
from soma_common.sagas.models import (
    Saga,
    SagaContext,
    SagaStatus,
    SagaStep,
    Signal,
    SubSaga,
    Timer,
    Tx,
    with_compensation,
)
from soma_common.testing.sagas import Crash, Delay, Duplicate, Failure, Point, SagaTestKit
from tests.core_support import event
from tests.saga_support import told


@dataclass
class Job:
    refuse: bool = False


CALLS = list[str]()


async def undo(job: Job, ctx: SagaContext) -> None:
    CALLS.append(f"undo {ctx.step}")


@with_compensation(undo)
async def outside(job: Job, ctx: SagaContext) -> str:
    CALLS.append(ctx.step)
    return "done"


async def inside(job: Job, tx: Tx) -> None:
    tx.publish(event(event_type="job.done", tenant_id="test"))
    if job.refuse:
        raise StepRefused("no")


JOB = Saga("job", Job, outside, Timer("night", 8 * 3600.0), SubSaga(Saga("inner", Job, inside)), deadline=1e6)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


async def test_a_night_passes_at_once(soma_database: str) -> None:
    began = time.monotonic()
    async with SagaTestKit(soma_database, JOB) as kit:
        run = await kit.run(JOB, Job())
        assert run.status is SagaStatus.COMPLETED
        assert run.done == ["outside", "night", "inner", "inner/inside"]
        assert [found.event_type for found in run.events] == ["job.done"]
        night = [entry.at for entry in run.journal if entry.step == "night"]
        assert night[1] - night[0] >= timedelta(hours=8)
    assert time.monotonic() - began < 3600


async def test_faults_happen_where_they_are_said_to(soma_database: str) -> None:
    async with SagaTestKit(soma_database, JOB) as kit:
        failure = Failure("outside", Point.AFTER_EFFECT, times=2)
        run = await kit.run(JOB, Job(), failure, Delay("inside", Point.BEFORE_EFFECT, seconds=5.0))
        assert told(run.journal)[:3] == ["retrying outside"] * 2 + ["done outside"]
        assert CALLS == ["outside"] * 3
        assert [str(fault) for fault in run.faults] == ["failure after-effect of outside"] * 2 + [
            "delay before-effect of inside"
        ]
        run = await kit.run(JOB, Job(), Failure("inside", error=StepRefused("injected")))
        assert run.undone == ["outside"]
        assert run.saga.error == "injected"
        assert run.events == ()
        run = await kit.run(JOB, Job(refuse=True), Crash("outside", Point.AFTER_EFFECT, undo=True))
        assert run.undone == ["outside"]
        assert CALLS.count("undo outside") == 1 + 2


async def test_a_paused_worker_comes_too_late(soma_database: str) -> None:
    async with SagaTestKit(soma_database, JOB) as kit:
        for point in (Point.BEFORE_EFFECT, Point.BEFORE_RECORD):
            CALLS.clear()
            run = await kit.run(JOB, Job(), Duplicate("outside", point))
            assert run.status is SagaStatus.COMPLETED
            assert [key.partition(":")[2] for key, _ in run.calls].count("outside") == 2
            assert told(run.journal).count("done outside") == 1


async def test_a_deadline_passes_when_the_clock_is_set(soma_database: str) -> None:
    saga = Saga("waits", Job, outside, Signal("go"), deadline=60.0)
    async with SagaTestKit(soma_database, saga) as kit:
        run = await kit.run(saga, Job())
        assert (run.status, run.saga.reason, run.undone) == (SagaStatus.COMPENSATED, "deadline", ["outside"])


async def test_a_fault_at_no_step_is_refused(soma_database: str) -> None:
    async with SagaTestKit(soma_database, JOB) as kit:
        with pytest.raises(ValidationError, match="crash after-effect of outsid is at no step"):
            await kit.run(JOB, Job(), Crash("outsid"))


async def test_a_saga_that_does_not_end_is_told(soma_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(job: Job) -> None: ...

    saga = Saga("stays", Job, SagaStep(act, pivot=True), Signal("go"))
    monkeypatch.setattr("soma_common.testing.sagas._PATIENCE", 1.0)
    async with SagaTestKit(soma_database, saga) as kit:
        with pytest.raises(TimeoutError):
            await kit.run(saga, Job())


def test_crash_points_are_those_of_every_step_and_compensation() -> None:
    points = [str(crash) for crash in SagaTestKit("postgresql://h/d", JOB).crash_points(JOB)]
    assert points == [
        *(f"crash {point} of outside" for point in Point if point != "before-commit"),
        *(f"crash {point} of inside" for point in Point),
        *(f"crash {point} of undo outside" for point in Point if point != "before-commit"),
    ]
