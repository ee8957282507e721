"""The sagas of a torture run: they move money in a ledger, by transactions, and in a bank outside, by a key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from soma_common.errors import OutcomeUnknown, StepRefused
from soma_common.events.models import Event
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from soma_common.sagas.models import (
    ForEach,
    From,
    Parallel,
    Saga,
    SagaContext,
    SagaStep,
    Signal,
    SubSaga,
    Timer,
    Tx,
    UndoPolicy,
    Unknown,
    When,
)
from tests.torture.saga_plans import LARGE, ROUNDS, TENANT, Job, Plan, posting

EVENT = "money.moved"
TABLES = """
CREATE TABLE accounts (account integer PRIMARY KEY, opening bigint NOT NULL, balance bigint NOT NULL);
CREATE TABLE ledger (
    place bigserial PRIMARY KEY, saga_id uuid NOT NULL, step text NOT NULL, undo boolean NOT NULL,
    account integer NOT NULL, cents bigint NOT NULL
);
CREATE TABLE bank (
    key text PRIMARY KEY, charged bigint NOT NULL DEFAULT 0, refunded bigint NOT NULL DEFAULT 0,
    charges integer NOT NULL DEFAULT 0, refunds integer NOT NULL DEFAULT 0, clash boolean NOT NULL DEFAULT false
);
CREATE TABLE mended (saga_id uuid PRIMARY KEY);
"""
_POST = """
WITH moved (account, cents) AS (VALUES ($1::integer, -$3::bigint), ($2::integer, $3::bigint)),
     written AS (
         INSERT INTO ledger (saga_id, step, undo, account, cents)
         SELECT $4::uuid, $5::text, $6::boolean, account, cents FROM moved)
UPDATE accounts a SET balance = a.balance + m.cents FROM moved m WHERE a.account = m.account
"""
# A charge that comes after its refund is void: a worker that was paused before its call makes it when it wakes.
_CHARGE = """
INSERT INTO bank AS b (key, charged, charges) VALUES ($1, $2, 1)
ON CONFLICT (key) DO UPDATE SET
    charges = b.charges + 1, charged = CASE WHEN b.refunds > 0 THEN b.charged ELSE excluded.charged END,
    clash = b.clash OR (b.charges > 0 AND b.refunds = 0 AND b.charged <> excluded.charged)
"""
_REFUND = """
INSERT INTO bank AS b (key, refunds) VALUES ($1, 1)
ON CONFLICT (key) DO UPDATE SET refunds = b.refunds + 1, refunded = b.charged
"""
_MENDED = "SELECT EXISTS (SELECT FROM mended WHERE saga_id = $1)"
_SOON = Backoff(base=0.02, maximum=0.5)
_STUBBORN: dict[str, Any] = {
    "max_retries": 60,
    "retry": _SOON,
    "timeout_seconds": 60.0,
}  # the bank is away while the database restarts
_UNDO = UndoPolicy(max_retries=60, retry=_SOON, timeout_seconds=60.0)
_LASTING = 36_000.0  # seconds
COIN_WAIT = 15.0  # seconds


class Bank:
    """The bank outside: its connections commit by themselves. One for each process, made by ``open_bank``."""

    pool: Pool


def open_bank(pool: Pool) -> None:
    """What the steps of this process call."""
    Bank.pool = pool


async def _call(sql: str, *args: Any) -> Any:
    """Ask the bank; an answer that is lost says nothing of what happened."""
    try:
        return await Bank.pool.fetch(sql, *args)
    except (StepRefused, asyncio.CancelledError):
        raise
    except Exception as error:
        raise OutcomeUnknown(f"The bank did not answer: {error!r:.200}") from error


def _fate(job: Job, ctx: SagaContext) -> tuple[str, int]:
    name, _, times = job.fates.get(ctx.step + (":undo" if ctx.undoing else ""), "").partition(":")
    return name, int(times or 0)


def _before(job: Job, ctx: SagaContext) -> str:
    """What fails before the effect; whether it is broken, is asked."""
    fate, times = _fate(job, ctx)
    if fate == "refused":
        raise StepRefused("refused for good")
    if fate == "flaky" and ctx.attempt <= times:
        raise ConnectionError("flaky")
    return fate


def _after(job: Job, ctx: SagaContext, error: type[Exception] = ConnectionError) -> None:
    """What fails after the effect, which is rolled back or repeated under its key."""
    fate, times = _fate(job, ctx)
    if fate == "late" and ctx.attempt <= times:
        raise error("late")


# Steps in transactions.


async def _post(job: Job, ctx: SagaContext, tx: Tx, coin: int = 0) -> int:
    if _before(job, ctx) == "broken" and not await tx.conn.fetchval(_MENDED, ctx.saga_id):
        raise StepRefused("broken until it is mended")
    moved = posting(ctx.saga, job, ctx.step, coin)
    debit, credit = (moved.credit, moved.debit) if ctx.undoing else (moved.debit, moved.credit)
    await tx.conn.execute(_POST, debit, credit, moved.cents, ctx.saga_id, ctx.step, ctx.undoing)
    tx.publish(event_of(ctx))
    _after(job, ctx)
    return moved.cents


def event_of(ctx: SagaContext) -> Event:
    """What a step tells the world: its key is the event's cause."""
    return Event(
        payload={"step": ctx.step, "undo": ctx.undoing}, tenant_id=TENANT, aggregate_type="saga",
        aggregate_id=str(ctx.saga_id), event_type=EVENT,
    )  # fmt: skip


async def _move(job: Job, ctx: SagaContext, tx: Tx) -> int:
    return await _post(job, ctx, tx)


async def _move_back(job: Job, ctx: SagaContext, tx: Tx) -> None:
    await _post(job, ctx, tx)


async def _insert(job: Job, coin: Annotated[int, From("coin")], ctx: SagaContext, tx: Tx) -> int:
    return await _post(job, ctx, tx, coin)


async def _take_out(job: Job, coin: Annotated[int, From("coin")], ctx: SagaContext, tx: Tx) -> None:
    await _post(job, ctx, tx, coin)


def _finish(job: Job, ctx: SagaContext, tx: Tx) -> int:
    """A plain function: it works in a thread, by another driver."""
    if _before(job, ctx) == "broken" and not _one(tx.conn.execute(_MENDED.replace("$1", "%s"), (ctx.saga_id,))):
        raise StepRefused("broken until it is mended")
    moved = posting(ctx.saga, job, ctx.step)
    debit, credit = (moved.credit, moved.debit) if ctx.undoing else (moved.debit, moved.credit)
    for account, cents in ((debit, -moved.cents), (credit, moved.cents)):
        tx.conn.execute(
            "INSERT INTO ledger (saga_id, step, undo, account, cents) VALUES (%s, %s, %s, %s, %s)",
            (ctx.saga_id, ctx.step, ctx.undoing, account, cents),
        )
        tx.conn.execute("UPDATE accounts SET balance = balance + %s WHERE account = %s", (cents, account))
    tx.publish(event_of(ctx))
    _after(job, ctx)
    return moved.cents


def _finish_back(job: Job, ctx: SagaContext, tx: Tx) -> None:
    _finish(job, ctx, tx)


def _one(cursor: Any) -> Any:
    return cursor.fetchone()[0]


def _tx(name: str, act: Callable[..., Any] = _move, back: Callable[..., Any] | None = _move_back) -> SagaStep:
    return SagaStep(act, back, name=name, undo=_UNDO, **_STUBBORN)


# Steps outside.


async def _charge(job: Job, ctx: SagaContext) -> int:
    fate = _before(job, ctx)
    if fate == "broken" and not (await _call(_MENDED, ctx.saga_id))[0][0]:
        raise StepRefused("broken until it is mended")
    if fate == "lost" and ctx.attempt == 1 and job.number % 2:
        raise OutcomeUnknown("the call was lost on its way")
    await asyncio.sleep(0.03)
    await _call(_CHARGE, ctx.key, job.cents)
    if fate == "lost" and ctx.attempt == 1:
        raise OutcomeUnknown("the answer was lost on its way")
    _after(job, ctx, OutcomeUnknown)
    await asyncio.sleep(0.03)
    return job.cents


async def _refund(job: Job, ctx: SagaContext) -> None:
    if _before(job, ctx) == "broken" and not (await _call(_MENDED, ctx.saga_id))[0][0]:
        raise StepRefused("broken until it is mended")
    await _call(_REFUND, ctx.key.removesuffix(":undo"))
    _after(job, ctx)


def _payees(job: Job) -> list[int]:
    return job.payees


def _is_large(job: Job) -> bool:
    return job.cents >= LARGE


def _rounds(job: Job) -> list[int]:
    return list(range(ROUNDS))


def _same(job: Job) -> Job:
    return job


SAGAS = [
    Saga("transfer", Job, _tx("hold"), _tx("credit"), _tx("fee"), deadline=_LASTING),
    Saga(
        "order", Job, _tx("reserve"), SagaStep(_charge, _refund, name="charge", undo=_UNDO, **_STUBBORN), _tx("book"),
        SagaStep(_charge, name="ship", pivot=True, **_STUBBORN), _tx("confirm", back=None), deadline=_LASTING,
    ),
    Saga(
        "careful", Job, _tx("hold"),
        SagaStep(_charge, _refund, name="charge", unknown=Unknown.COMPENSATE, undo=_UNDO, **_STUBBORN),
        _tx("settle"), deadline=_LASTING,
    ),
    Saga(
        "split", Job, _tx("fund"), Parallel(_tx("levy"), ForEach(_payees, _tx("pay"), at_once=2)), _tx("close"),
        deadline=_LASTING,
    ),
    Saga(
        "nested", Job, When(_is_large, _tx("approve"), otherwise=_tx("quick")),
        SubSaga(Saga("inner", Job, _tx("hold"), _tx("credit")), _same), _tx("finish", _finish, _finish_back),
        deadline=_LASTING,
    ),
    Saga(
        "coins", Job, _tx("fund"), Timer("pause", 0.3),
        ForEach(_rounds, Signal("coin", int, timeout_seconds=COIN_WAIT), _tx("insert", _insert, _take_out)),
        _tx("close"), deadline=_LASTING,
    ),
]  # fmt: skip
BY_NAME = {saga.name: saga for saga in SAGAS}


def definition(plan: Plan) -> Saga:
    """The definition of a saga of the run."""
    return BY_NAME[plan.name]


__all__ = ["EVENT", "SAGAS", "TABLES", "Bank", "definition", "open_bank"]
