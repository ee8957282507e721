"""Sagas that tests run on Temporal, in this process and in others. What was done is a line of a file, or a row."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel

from soma_common.errors import OutcomeUnknown, StepRefused
from soma_common.events.models import Event
from soma_common.retry import Backoff
from soma_common.sagas.context import SagaContext
from soma_common.sagas.models import Saga
from soma_common.sagas.parameters import From
from soma_common.sagas.steps import (
    ForEach,
    Parallel,
    SagaStep,
    Signal,
    SubSaga,
    Timer,
    UndoPolicy,
    Unknown,
    When,
    with_compensation,
)
from soma_common.tx import Tx

AT_ONCE = Backoff(base=0.01, maximum=0.02)
TABLE = "CREATE TABLE deeds (number serial, key text, deed text)"


class Order(BaseModel):
    """``folder``: where external steps write down what they did; the step ``failing`` fails."""

    folder: str
    failing: str = ""
    items: list[str] = []
    gift: bool = False


class Hold(BaseModel):
    """What a reservation gave."""

    number: int


class Paid(BaseModel):
    """What a payment gave."""

    reference: str


def note(order: Order, deed: str) -> None:
    """Write a deed down, unless it is to fail."""
    if order.failing == deed:
        raise StepRefused(f"{deed} is refused")
    with Path(order.folder, "deeds").open("a") as file:
        file.write(f"{deed}\n")


def noted(folder: str | Path) -> list[str]:
    """What was written down."""
    file = Path(folder, "deeds")
    return file.read_text().splitlines() if file.exists() else []


async def write(tx: Tx, ctx: SagaContext, order: Order, deed: str) -> None:
    """A deed as a row."""
    if order.failing == deed:
        raise StepRefused(f"{deed} is refused")
    await tx.conn.execute("INSERT INTO deeds (key, deed) VALUES ($1, $2)", ctx.key, deed)
    tx.publish(Event(aggregate_id=deed, tenant_id="t", event_type="deed.done", payload={"deed": deed}))


async def free(order: Order, hold: Hold, tx: Tx, ctx: SagaContext) -> None:
    await write(tx, ctx, order, f"free {hold.number}")


@with_compensation(free)
async def reserve(order: Order, tx: Tx, ctx: SagaContext) -> Hold:
    await write(tx, ctx, order, "reserve")
    return Hold(number=7)


async def refund(order: Order, paid: Paid) -> None:
    note(order, f"refund {paid.reference}")


@with_compensation(refund)
async def pay(order: Order, hold: Hold, ctx: SagaContext) -> Paid:
    note(order, "pay")
    return Paid(reference=f"r{hold.number}")


def unpack(order: Order) -> None:
    note(order, "unpack")


@with_compensation(unpack)
def pack(order: Order) -> None:
    note(order, "pack")


async def ship(order: Order, paid: Paid, tx: Tx, ctx: SagaContext) -> str:
    await write(tx, ctx, order, "ship")
    return f"shipped for {paid.reference}"


place_order = Saga("place-order", Order, reserve, pay, pack, ship, deadline=60)


# One of everything.


def undoing(deed: str) -> Any:
    async def undo(order: Order) -> None:
        note(order, f"undo {deed}")

    return undo


def doing(deed: str) -> SagaStep:
    async def act(order: Order) -> str:
        note(order, deed)
        return deed

    return SagaStep(act, undoing(deed), name=deed, retry=AT_ONCE)


def is_gift(order: Order) -> bool:
    return order.gift


def items(order: Order) -> list[str]:
    return order.items


def unlabel(order: Order, item: Annotated[str, From("items")], label: Annotated[str, From("label")]) -> None:
    note(order, f"undo {label} of {item}")


@with_compensation(unlabel)
async def label(order: Order, item: Annotated[str, From("items")]) -> str:
    note(order, f"label {item}")
    return f"label of {item}"


def first_label(order: Order, labels: Annotated[list[str], From("label")]) -> str:
    return labels[0] if labels else "none"


async def unstamp(word: str, stamp: Annotated[str, From("stamp")]) -> None: ...


@with_compensation(unstamp)
async def stamp(word: str) -> str:
    return f"stamped {word}"


stamping = Saga("stamping", str, stamp)


async def last(order: Order, stamped: Annotated[str, From("stamping")], said: Annotated[str, From("approved")]) -> str:
    note(order, "last")
    return f"{stamped}, {said}"


def everything() -> Saga:
    """Every kind of part."""
    return Saga(
        "everything", Order,
        doing("first"),
        Parallel(doing("left"), [doing("right-1"), Timer("rest", 0.05), doing("right-2")]),
        When(is_gift, doing("wrap"), otherwise=doing("bag")),
        ForEach(items, label, at_once=2),
        SubSaga(stamping, first_label),
        Timer("pause", 0.05),
        Signal("approved", str),
        last,
        deadline=60,
    )  # fmt: skip


# What goes wrong.


async def stubborn_undo(order: Order) -> None:
    if not Path(order.folder, "mended").exists():
        raise RuntimeError("broken")
    note(order, "undo stubborn")


async def stubborn(order: Order) -> None:
    note(order, "stubborn")


async def never(order: Order) -> None:
    raise StepRefused("never")


stuck_undo = Saga(
    "stuck-undo", Order, doing("first"),
    SagaStep(stubborn, stubborn_undo, undo=UndoPolicy(max_retries=2, retry=AT_ONCE)), never, deadline=60,
)  # fmt: skip


async def vague_undo(order: Order) -> None:
    note(order, "undo vague")


async def vague(order: Order) -> str:
    note(order, "vague")
    raise OutcomeUnknown("the line was cut")


def unknown(policy: Unknown) -> Saga:
    """A step of which nobody knows whether it happened."""
    step = SagaStep(vague, vague_undo, unknown=policy, max_retries=1, retry=AT_ONCE)
    return Saga(f"vague-{policy}", Order, doing("first"), step, doing("last"), deadline=60)


class Stranger:
    """JSON has no such thing."""


async def strange(order: Order) -> Any:
    note(order, "strange")
    return Stranger()


unserialisable = Saga("strange", Order, doing("first"), strange, deadline=60)


async def hang(order: Order) -> None:
    note(order, "hang")
    await asyncio.Event().wait()


behind_pivot = Saga(
    "behind-pivot", Order, doing("first"), SagaStep(pack, name="pivot", pivot=True, unknown=Unknown.COMPENSATE),
    SagaStep(never, max_retries=0), deadline=60,
)  # fmt: skip
waiting = Saga("waiting", Order, doing("first"), Signal("approved", Paid), doing("last"), deadline=60)
optional = Saga("optional", Order, Signal("approved", str, timeout_seconds=0.1, optional=True), doing("last"))
late = Saga("late", Order, doing("first"), Signal("approved", str), deadline=0.5)
impatient = Saga("impatient", Order, doing("first"), Signal("approved", str, timeout_seconds=0.1), deadline=60)


def plainly(order: Order, tx: Tx) -> int:
    tx.conn.execute("INSERT INTO deeds (key, deed) VALUES ('plain', 'plain')")
    return 1


plain_functions = Saga("plain", Order, SagaStep(plainly, name="plainly"))


def many(order: Order) -> list[int]:
    return list(range(len(order.items)))


async def one(item: Annotated[int, From("many")]) -> int:
    return item * 2


async def total(doubles: Annotated[list[int], From("one")]) -> int:
    return sum(doubles)


long_loop = Saga("long-loop", Order, ForEach(many, one, at_once=10), total)


async def cautious(order: Order) -> str:
    note(order, "cautious")
    return "done"


careful = Saga("careful", Order, doing("first"), SagaStep(cautious, unknown=Unknown.ASK), doing("last"), deadline=60)

brief = Saga("brief", Order, SagaStep(reserve, timeout_seconds=3), doing("last"))


def broken_rule(order: Order) -> bool:
    raise ValueError(f"nobody knows {order.failing}")


broken = Saga("broken", Order, doing("first"), When(broken_rule, doing("last")), deadline=60)


# Loops in loops and sub-sagas.


def boxes(order: Order) -> list[str]:
    return order.items


def corners(box: Annotated[str, From("boxes")]) -> list[int]:
    return [1, 2]


def unmark(
    box: Annotated[str, From("boxes")], corner: Annotated[int, From("corners")], mark: Annotated[str, From("mark")]
) -> None: ...


@with_compensation(unmark)
async def mark(box: Annotated[str, From("boxes")], corner: Annotated[int, From("corners")]) -> str:
    return f"{box}{corner}"


def word(marks: Annotated[list[str], From("mark")], box: Annotated[str, From("boxes")]) -> str:
    return box + ",".join(marks)


async def seal(
    order: Order, stamped: Annotated[str, From("stamping")], marks: Annotated[list[str], From("mark")]
) -> str:
    return f"{stamped} {marks}"


async def close(seals: Annotated[list[str], From("seal")], words: Annotated[list[str], From("stamping")]) -> int:
    return len(seals) + len(words)


outer = Saga("outer", Order, ForEach(boxes, ForEach(corners, mark), SubSaga(stamping, word), seal), close, deadline=60)
