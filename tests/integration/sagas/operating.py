"""What the tests of ``somastack saga`` share: sagas, and how they come to where an operator meets them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from click.testing import Result

from soma_common.errors import StepRefused
from soma_common.retry import Backoff
from soma_common.sagas.models import Saga, SagaContext, SagaStep, Signal, Timer, UndoPolicy, Unknown, with_compensation
from soma_common.sagas.views import SagaView
from tests.saga_support import Sagas

Ask = Callable[[Callable[[Sagas], Awaitable[Any]]], Any]
Run = Callable[..., Result]
SOON = Backoff(base=0.001, maximum=0.01)
HOSTILE = "\x1b[2J\x9b2J\x1b]0;t\x07\n\u202eCure:  rm"
MODULE = __name__
NOBODY = "00000000-0000-7000-8000-000000000000"


async def hold(order: str) -> list[str]:
    return [f"held {order}"]


async def cannot(order: str, held: list[str]) -> None:
    raise ConnectionError(HOSTILE if order == "hostile" else f"cannot undo {order}")


@with_compensation(cannot)
async def reserve(order: str) -> list[str]:
    return [f"held {order}"]


async def pay(order: str, ctx: SagaContext) -> int:
    if order == "refuse":
        raise StepRefused("no money")
    if order == "hostile":
        raise StepRefused(HOSTILE)
    if order == "flaky" and ctx.attempt < 6:
        raise ConnectionError(f"try {ctx.attempt}")
    return 7


async def charge(order: str) -> int:
    await asyncio.sleep(5.0)
    return 1


undoable = SagaStep(reserve, undo=UndoPolicy(max_retries=1, retry=SOON))
fine = Saga("place-order", str, hold, SagaStep(pay, max_retries=9, retry=SOON), version=3)
bad = Saga("bad-undo", str, undoable, pay)
doubt = Saga("doubt", str, undoable, SagaStep(charge, timeout_seconds=0.05, unknown=Unknown.ASK))
waits = Saga("waits", str, SagaStep(pay), Signal("approved", int))
sleeps = Saga("sleeps", str, SagaStep(pay), Timer("night", 3600))
ALL = (fine, bad, doubt, waits, sleeps)


def ran(ask: Ask, definition: Saga, given: str, *, until: Callable[[SagaView], bool] | None = None) -> str:
    """The id of a saga that a worker brought to its end, or so far."""

    async def work(sagas: Sagas) -> str:
        saga_id = await sagas.start(definition, given)
        async with sagas.worker():
            if until is None:
                await sagas.ended(saga_id)
            else:
                while not until(await sagas.orchestrator.get_saga(saga_id)):
                    await asyncio.sleep(0.01)
        return str(saga_id)

    found: str = ask(work)
    return found


def is_waiting(view: SagaView) -> bool:
    return view.last_what == "waiting" and not view.has_worker


def started(ask: Ask, definition: Saga, given: str = "1", **more: Any) -> str:
    """The id of a saga that no worker has seen."""
    return str(ask(lambda sagas: sagas.start(definition, given, **more)))


def view_of(ask: Ask, saga_id: str) -> SagaView:
    found: SagaView = ask(lambda sagas: sagas.orchestrator.get_saga(saga_id))
    return found


def journal_of(run: Run, saga_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("inspect", saga_id, "--json").output)["journal"]
    return found


def finished(ask: Ask, saga_id: str) -> SagaView:
    """The saga after a worker had it."""

    async def work(sagas: Sagas) -> SagaView:
        async with sagas.worker():
            return await sagas.ended(UUID(saga_id))

    found: SagaView = ask(work)
    return found


def assert_harmless(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text), text
