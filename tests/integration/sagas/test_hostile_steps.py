"""Steps that do what they should not, and what becomes of their sagas."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from soma_common.errors import MigrationError
from soma_common.retry import Backoff
from soma_common.sagas.models import Saga, SagaStatus, SagaStep, Signal, Timer, Tx, UndoPolicy, Unknown, When
from soma_common.sagas.values import MOST_VALUE
from soma_common.sagas.views import SagaView
from tests.core_support import event
from tests.saga_support import TENANT, Sagas, told
from tests.waiting import until

SOON = Backoff(base=0.001, maximum=0.01)
ONCE = {"max_retries": 0, "retry": SOON}


async def done(sagas: Sagas) -> list[str]:
    return [row[0] for row in await sagas.pool.fetch("SELECT what FROM done ORDER BY place")]


async def before(number: int) -> None: ...


async def unbefore(number: int, tx: Tx) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ('undone')")


FIRST = SagaStep(before, unbefore)


async def failing(sagas: Sagas, step: Any, **settings: Any) -> SagaView:
    """A saga whose second step is this one; the first one is undone, however it fails."""
    view = await sagas.run(Saga(f"hostile-{id(step)}", int, FIRST, step), 1, **settings)
    assert view.status is SagaStatus.COMPENSATED
    assert await done(sagas) == ["undone"]
    return view


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), "The result of act: the value: Input should be a valid string"),
        ("\0", "PayloadInvalid|NUL"),
        ("\ud800", "cannot be written as JSON|valid string"),
        ("x" * (MOST_VALUE + 1), f"use at most {MOST_VALUE}|bytes of JSON"),
    ],
    ids=["another type", "NUL", "surrogate", "too large"],
)
@pytest.mark.parametrize("transactional", [True, False])
async def test_a_result_that_cannot_be_kept(sagas: Sagas, value: Any, error: str, *, transactional: bool) -> None:
    async def inside(number: int, tx: Tx) -> str:
        await tx.conn.execute("INSERT INTO done (what) VALUES ('rolled back')")
        return value

    async def outside(number: int) -> str:
        return value

    view = await failing(sagas, SagaStep(inside if transactional else outside, name="act"))
    import re

    assert re.search(error, f"{view.error_type} {view.error}"), view.error
    # It is not tried again: the next result would be the same.
    lines = ["failed act"] if transactional else ["unknown act", "failed act"]
    assert told(view.journal)[1 : 1 + len(lines)] == lines


async def test_a_result_that_refers_to_itself(sagas: Sagas) -> None:
    async def act(number: int) -> list[Any]:
        circle: list[Any] = []
        circle.append(circle)
        return circle

    view = await failing(sagas, SagaStep(act))
    assert view.error_type == "soma_common.errors.PayloadInvalid"


class Odd(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise ValueError


def raising(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    async def act(number: int) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        BaseException("base"),
        Odd(),
        StopIteration(1),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("transactional", [True, False])
async def test_whatever_a_step_raises_is_its_failure(
    sagas: Sagas, error: BaseException, *, transactional: bool
) -> None:
    async def inside(number: int, tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO done (what) VALUES ('rolled back')")
        raise error

    act = SagaStep(inside if transactional else raising(error), name="act", **ONCE)
    view = await failing(sagas, act)
    assert told(view.journal)[1:3] == ["failed act", "turned"]
    assert view.error_type


async def test_a_plain_function_that_raises_anything(sagas: Sagas) -> None:
    def act(number: int) -> None:
        sys.exit(3)

    view = await failing(sagas, SagaStep(act, **ONCE))
    assert view.error_type == "SystemExit"


async def test_a_step_that_takes_too_long_is_cancelled(sagas: Sagas) -> None:
    cancelled = list[str]()

    async def act(number: int) -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append("yes")
            raise

    view = await failing(sagas, SagaStep(act, timeout_seconds=0.05, **ONCE))
    assert told(view.journal)[1:3] == ["unknown act", "failed act"]
    assert (view.error_type, cancelled) == ("TimeoutError", ["yes"])


async def test_a_statement_that_takes_too_long_is_cancelled(sagas: Sagas) -> None:
    async def act(number: int, tx: Tx) -> None:
        await tx.conn.execute("SELECT pg_sleep(600)")

    view = await failing(sagas, SagaStep(act, timeout_seconds=0.1, **ONCE))
    assert told(view.journal)[1] == "failed act"  # it is known: it was rolled back


@pytest.mark.parametrize("transactional", [True, False])
async def test_a_step_that_does_not_let_itself_be_cancelled_is_left_behind(
    sagas: Sagas, *, transactional: bool
) -> None:
    free, before = asyncio.Event(), asyncio.all_tasks()

    async def stubborn() -> None:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue

    async def inside(number: int, tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO done (what) VALUES ('never')")
        await stubborn()

    async def outside(number: int) -> None:
        await stubborn()

    try:
        act = SagaStep(inside if transactional else outside, name="act", timeout_seconds=0.05, **ONCE)
        view = await failing(sagas, act, grace=0.1, lease=1.0)
        assert told(view.journal)[1:3] == (["failed act", "turned"] if transactional else ["unknown act", "failed act"])
        assert "nor when it was cancelled" in f"{view.error}"
    finally:
        free.set()
        await until(lambda: asyncio.all_tasks() <= before, what="what was left behind ends")


async def test_a_thread_that_hangs_is_left_behind(sagas: Sagas) -> None:
    free, before = threading.Event(), asyncio.all_tasks()

    def inside(number: int, tx: Tx) -> None:
        tx.conn.execute("INSERT INTO done (what) VALUES ('never')")
        free.wait(600)

    try:
        view = await failing(sagas, SagaStep(inside, timeout_seconds=0.1, **ONCE))
        assert told(view.journal)[1] == "failed inside"
    finally:
        free.set()
        await until(lambda: asyncio.all_tasks() <= before, what="what was left behind ends")


async def test_a_step_that_blocks_the_loop_is_late_and_nothing_else(sagas: Sagas) -> None:
    async def act(number: int) -> str:
        time.sleep(1.5)  # noqa: ASYNC251 - longer than the lease: nobody else is there to take it over
        return "slept"

    assert (await sagas.run(Saga("blocks", int, act), 1, lease=0.5)).result == "slept"


async def test_a_step_that_ends_its_transaction_fails(sagas: Sagas) -> None:
    async def act(number: int, tx: Tx) -> None:
        await tx.conn.execute("ROLLBACK")

    view = await failing(sagas, SagaStep(act, **ONCE))
    assert "ended its transaction" in f"{view.error}"


async def test_a_step_that_goes_on_after_a_failed_statement_fails(sagas: Sagas) -> None:
    async def act(number: int, tx: Tx) -> None:
        try:
            await tx.conn.execute("SELECT 1/0")
        except Exception:
            return

    view = await failing(sagas, SagaStep(act, **ONCE))
    assert "current transaction is aborted" in f"{view.error}"


async def test_a_step_whose_transaction_cannot_commit_fails(sagas: Sagas) -> None:
    await sagas.pool.fetch("CREATE TABLE one (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    async def act(number: int, tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO one VALUES (1), (1)")

    view = await failing(sagas, SagaStep(act, **ONCE))
    assert view.error_type == "asyncpg.exceptions.UniqueViolationError"


async def test_a_worker_without_rights_ends_and_harms_no_saga(sagas: Sagas) -> None:
    saga = Saga("rights", int, before)
    await sagas.pool.fetch("ALTER TABLE soma.saga_steps RENAME TO away")
    saga_id = await sagas.start(saga, 1)
    worker = sagas.worker(saga)
    await worker.start()
    with pytest.raises(MigrationError, match="saga_steps"):
        await asyncio.wait_for(worker.wait(), 60)
    with pytest.raises(MigrationError):
        await worker.stop()
    await sagas.pool.fetch("ALTER TABLE soma.away RENAME TO saga_steps")
    async with sagas.worker(saga):
        assert (await sagas.ended(saga_id)).status is SagaStatus.COMPLETED


async def test_a_step_that_publishes_garbage_fails(sagas: Sagas) -> None:
    async def nothing(number: int, tx: Tx) -> None:
        tx.publish(None)  # type: ignore[arg-type]

    async def too_large(number: int, tx: Tx) -> None:
        tx.publish(event(payload={"x": "y" * 1024 * 1024}, tenant_id=TENANT))

    view = await failing(sagas, SagaStep(nothing))
    assert "is no Event" in f"{view.error}"
    await sagas.pool.fetch("TRUNCATE done")
    view = await failing(sagas, SagaStep(too_large))
    assert view.error_type == "soma_common.errors.EventTooLarge"


async def test_a_step_that_was_not_awaited_fails(sagas: Sagas) -> None:
    def act(number: int) -> Any:
        return asyncio.sleep(0)

    view = await failing(sagas, SagaStep(act, **ONCE))
    assert "nobody awaits" in f"{view.error}"


async def test_a_step_whose_connection_is_cut_is_done_again_and_costs_no_try(sagas: Sagas) -> None:
    cuts = list[int]()

    async def act(number: int, tx: Tx) -> str:
        await tx.conn.execute("INSERT INTO done (what) VALUES ('act')")
        if len(cuts) < 5:
            cuts.append(await tx.conn.fetchval("SELECT pg_backend_pid()"))
            await sagas.pool.fetch("SELECT pg_terminate_backend($1::integer)", cuts[-1])
            await tx.conn.execute("SELECT 1")
        return "acted"

    view = await sagas.run(Saga("cut", int, SagaStep(act, **ONCE)), 1)
    assert (view.status, view.result) == ("completed", "acted")
    assert told(view.journal) == ["done act", "ended"]
    assert await done(sagas) == ["act"]


async def test_rules_that_fail_turn_the_saga(sagas: Sagas) -> None:
    def broken(number: int) -> bool:
        raise RuntimeError("the rule is broken")

    def never(number: int) -> Any:
        return "soon"

    view = await failing(sagas, When(broken, before2))
    assert (view.reason, view.error) == ("broken", "the rule is broken")
    await sagas.pool.fetch("TRUNCATE done")
    view = await failing(sagas, Timer("never", never))
    assert "A timer waits for 'soon'" in f"{view.error}"


async def before2(number: int) -> None: ...


async def test_an_undo_that_hangs_or_raises_anything_is_tried_again_and_then_stuck(sagas: Sagas) -> None:
    calls = list[str]()

    async def undo(number: int) -> None:
        calls.append("undo")
        if len(calls) == 1:
            await asyncio.sleep(600)
        raise SystemExit(1)

    policy = UndoPolicy(timeout_seconds=0.05, max_retries=2, retry=SOON)
    saga = Saga(
        "undo", int, SagaStep(before, undo, undo=policy), SagaStep(raising(ValueError("no")), name="act", **ONCE)
    )
    view = await sagas.run(saga, 1)
    assert view.status is SagaStatus.STUCK
    assert told(view.journal)[-4:] == ["undo-retrying before", "undo-retrying before", "undo-failed before", "stuck"]
    assert view.error_type == "SystemExit"
    assert len(calls) == 3


async def test_signals_refuse_what_is_no_json(sagas: Sagas) -> None:
    saga_id = await sagas.start(Saga("waits", int, Signal("go", int)), 1)
    for payload in (object(), {"x": "\0"}, "x" * (MOST_VALUE + 1)):
        with pytest.raises(Exception, match="Signal go"):
            await sagas.orchestrator.signal(saga_id, "go", payload)
    for name in ("", "x" * 513, "a\0b", 5):
        with pytest.raises(Exception, match="A signal's name is"):
            await sagas.orchestrator.signal(saga_id, name)  # type: ignore[arg-type]


async def test_unknown_and_ask_for_a_step_that_took_too_long(sagas: Sagas) -> None:
    async def act(number: int) -> None:
        await asyncio.sleep(600)

    view = await sagas.run(Saga("slow", int, FIRST, SagaStep(act, timeout_seconds=0.05, unknown=Unknown.ASK)), 1)
    assert told(view.journal)[1:] == ["begun act", "unknown act", "stuck"]
