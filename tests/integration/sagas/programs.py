"""Sagas that processes of their own run. The input says what they do; the table ``done`` what they did."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import Annotated

from soma_common.sagas.models import From, Saga, SagaContext, SagaStep, Tx, Unknown, with_compensation
from tests.saga_process import mark, seen


@dataclass
class Job:
    """What to do: ``how`` in the second step."""

    dsn: str
    how: str = ""


async def unfirst(job: Job, tx: Tx) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ('unfirst')")


@with_compensation(unfirst)
async def first(job: Job, tx: Tx) -> str:
    await tx.conn.execute("INSERT INTO done (what) VALUES ('first')")
    return "first"


async def second(job: Job, ctx: SagaContext) -> str:
    mark(job.dsn, f"second {ctx.key.partition(':')[2]} {os.getpid()}")
    match job.how:
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "block":
            time.sleep(600)  # noqa: ASYNC251 - it blocks its process
        case "sleep":
            await asyncio.sleep(600)
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "fork":
            if os.fork() == 0:
                return "child"
        case "exit-once":
            if seen(job.dsn, "second") == 1:
                os._exit(3)
    return "second"


async def unsecond(job: Job, second: str | None, ctx: SagaContext) -> None:
    mark(job.dsn, f"unsecond {ctx.key.partition(':')[2]} {second}")


async def third(second: Annotated[str, From("second")], tx: Tx) -> str:
    await tx.conn.execute("INSERT INTO done (what) VALUES ('third')")
    return second


async def hold(job: Job, tx: Tx) -> str:
    """It pauses its process while it has a lock."""
    await tx.conn.execute("UPDATE done SET what = what || '!' WHERE what LIKE 'locked%'")
    if job.how == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    return "held"


def hold_in_thread(job: Job, tx: Tx) -> str:
    """The same as a plain function."""
    tx.conn.execute("UPDATE done SET what = what || '!' WHERE what LIKE 'locked%'")
    if job.how == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    return "held"


PLAIN = Saga("plain", Job, first, SagaStep(second, timeout_seconds=900.0), third, deadline=3600.0)
CAREFUL = Saga(
    "careful", Job, first, SagaStep(second, unsecond, timeout_seconds=900.0, unknown=Unknown.COMPENSATE), third,
    deadline=3600.0,
)  # fmt: skip
ASKING = Saga(
    "asking", Job, first, SagaStep(second, timeout_seconds=900.0, unknown=Unknown.ASK), third, deadline=3600.0
)
LOCKING = Saga("locking", Job, SagaStep(hold, timeout_seconds=2.0, max_retries=20), deadline=3600.0)
LOCKING_IN_THREAD = Saga(
    "locking-in-thread", Job, SagaStep(hold_in_thread, timeout_seconds=2.0, max_retries=20), deadline=3600.0
)
SAGAS = [PLAIN, CAREFUL, ASKING, LOCKING, LOCKING_IN_THREAD]
