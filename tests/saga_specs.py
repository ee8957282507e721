"""Sagas made from plain data: definitions as hypothesis draws them, and what must become of them.

A spec is a list of parts, each a JSON object; worker processes make the same definitions from it. The rules of what must
become of a saga are written down here once more, without the library's machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID

import asyncpg
from hypothesis import strategies as st

from soma_common.errors import OutcomeUnknown, StepRefused
from soma_common.retry import Backoff
from soma_common.sagas.models import (
    ForEach,
    Parallel,
    Saga,
    SagaContext,
    SagaStatus,
    SagaStep,
    SubSaga,
    Tx,
    Unknown,
    When,
)
from soma_common.sagas.views import SagaView

Spec = Sequence[Mapping[str, Any]]
TABLE = "CREATE TABLE saga_effects (place bigserial, saga_id uuid NOT NULL, step text NOT NULL, undo boolean NOT NULL)"
_SOON = Backoff(base=0.001, maximum=0.005)
_EFFECT = "INSERT INTO saga_effects (saga_id, step, undo) VALUES ($1, $2, $3)"

_STEPS = st.fixed_dictionaries(
    {
        "kind": st.just("step"),
        "tx": st.booleans(),
        "undo": st.booleans(),
        "careful": st.booleans(),  # an external one: its unknown outcome is undone
        "flaky": st.integers(0, 2),  # so often it fails before it works
        "ends": st.sampled_from(["done"] * 6 + ["refused", "unknown"]),
    }
)
_PARTS = st.recursive(
    _STEPS,
    lambda inner: st.one_of(
        st.builds(lambda b: {"kind": "parallel", "branches": b}, st.lists(st.lists(inner, min_size=1, max_size=2), min_size=2, max_size=3)),
        st.builds(
            lambda yes, then, otherwise: {"kind": "when", "yes": yes, "then": then, "otherwise": otherwise},
            st.booleans(), st.lists(inner, min_size=1, max_size=2), st.lists(inner, max_size=2),
        ),
        st.builds(
            lambda n, at_once, body: {"kind": "each", "items": n, "at_once": at_once, "body": body},
            st.integers(0, 3), st.integers(1, 2), st.lists(inner, min_size=1, max_size=2),
        ),
        st.builds(lambda parts: {"kind": "saga", "parts": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A definition, perhaps with a pivot among its outermost steps."""
    parts = draw(st.lists(_PARTS, min_size=1, max_size=4))
    pivots = [n for n, part in enumerate(parts) if part["kind"] == "step"]
    if pivots and draw(st.booleans()):
        place = draw(st.sampled_from(pivots))
        parts[place] = parts[place] | {"pivot": True, "undo": False, "ends": "done"}
    return parts


@dataclass
class Plan:
    """What every saga of the tests is started with."""

    dsn: str


@dataclass
class Done:
    """What every step gives."""

    step: str


def build(name: str, spec: Spec) -> Saga:
    """The definition of a spec. Names are numbers, in the order in which the parts stand there."""
    numbers = count(1)

    def parts(inner: Spec) -> list[Any]:
        return [part(each) for each in inner]

    def part(each: Mapping[str, Any]) -> Any:
        own = f"p{next(numbers)}"
        match each["kind"]:
            case "step":
                return _step(own, each)
            case "parallel":
                return Parallel(*(parts(branch) for branch in each["branches"]))
            case "when":
                yes = bool(each["yes"])
                return When(lambda plan: yes, *parts(each["then"]), otherwise=parts(each["otherwise"]), name=own)
            case "each":
                return ForEach(_items(each["items"]), *parts(each["body"]), at_once=each["at_once"], name=own)
            case _:
                return SubSaga(Saga(f"{name}-{own}", Plan, *parts(each["parts"])), name=own)

    return Saga(name, Plan, *parts(spec), deadline=36000.0)


def _items(number: int) -> Any:
    def items(plan: Plan) -> list[int]:
        return list(range(number))

    return items


def _step(name: str, each: Mapping[str, Any]) -> SagaStep:
    outside = not each["tx"]

    async def act(plan: Plan, ctx: SagaContext, tx: Tx | None) -> Done:
        if each["ends"] == "refused":
            raise StepRefused("refused")
        if ctx.attempt <= each["flaky"]:
            raise ConnectionError("flaky")
        await _effect(plan, ctx, tx)
        if each["ends"] == "unknown" and outside:
            raise OutcomeUnknown("lost")
        return Done(ctx.step)

    async def undo(plan: Plan, ctx: SagaContext, tx: Tx | None, done: Done | None) -> None:
        if ctx.attempt <= each["flaky"]:
            raise ConnectionError("flaky")
        await _effect(plan, ctx, tx)

    async def act_inside(plan: Plan, ctx: SagaContext, tx: Tx) -> Done:
        return await act(plan, ctx, tx)

    async def act_outside(plan: Plan, ctx: SagaContext) -> Done:
        return await act(plan, ctx, None)

    async def undo_inside(plan: Plan, ctx: SagaContext, tx: Tx, done: Done | None) -> None:
        await undo(plan, ctx, tx, done)

    careful = outside and each["careful"] and each["undo"]
    return SagaStep(
        act_outside if outside else act_inside, undo_inside if each["undo"] else None, name=name, max_retries=3,
        retry=_SOON, pivot=each.get("pivot", False), unknown=Unknown.COMPENSATE if careful else Unknown.RETRY,
    )  # fmt: skip


async def _effect(plan: Plan, ctx: SagaContext, tx: Tx | None) -> None:
    arguments = (ctx.saga_id, ctx.step, ctx.undoing)
    if tx is not None:
        await tx.conn.execute(_EFFECT, *arguments)
        return
    connection = await asyncpg.connect(plan.dsn)
    try:
        await connection.execute(_EFFECT, *arguments)
    finally:
        await connection.close()


@dataclass(frozen=True)
class Place:
    """A step of a running saga, with the path under which the journal has it."""

    path: str
    step: Mapping[str, Any]

    @property
    def works(self) -> bool:
        """Whether it is done in the end, when it comes to it."""
        return bool(self.step["ends"] == "done" or (self.step["ends"] == "unknown" and self.step["tx"]))

    @property
    def careful(self) -> bool:
        return bool(not self.step["tx"] and self.step["careful"] and self.step["undo"])


def places(spec: Spec) -> Iterator[Place]:
    """Steps in the order of the definition; of conditions only what is taken."""
    numbers = count(1)

    def series(inner: Spec, prefix: str, *, taken: bool) -> Iterator[Place]:
        for each in inner:
            yield from one(each, prefix, taken=taken)

    def one(each: Mapping[str, Any], prefix: str, *, taken: bool) -> Iterator[Place]:
        own = f"{prefix}p{next(numbers)}"
        match each["kind"]:
            case "step":
                if taken:
                    yield Place(own, each)
            case "parallel":
                for branch in each["branches"]:
                    yield from series(branch, prefix, taken=taken)
            case "when":
                yield from series(each["then"], prefix, taken=taken and each["yes"])
                yield from series(each["otherwise"], prefix, taken=taken and not each["yes"])
            case "each":
                body = list(series(each["body"], "", taken=taken))  # the same names for every item
                for item in range(each["items"]):
                    for place in body:
                        yield Place(f"{own}[{item}]/{place.path}", place.step)
            case _:
                yield from series(each["parts"], f"{own}/", taken=taken)

    return series(spec, "", taken=True)


def check(spec: Spec, view: SagaView, effects: Sequence[tuple[str, bool]], *, killed: bool) -> None:
    """What REQUIREMENTS 23.2 and DESIGN 9 say of a saga that ended, from its journal and its effects alone.

    ``killed``: workers died at it, so that external steps may have had their effect more than once.
    """
    every = list(places(spec))
    by_path = {place.path: place for place in every}
    done = [entry.step for entry in view.journal if entry.what == "done" and entry.step in by_path]
    undone = [entry.step for entry in view.journal if entry.what == "undone"]
    unknown = {entry.step for entry in view.journal if entry.what == "unknown"}
    assert len(set(done)) == len(done)
    assert set(done) <= {place.path for place in every if place.works}
    forward = [step for step, undo in effects if not undo]
    back = [step for step, undo in effects if undo]
    pivot = next((place.path for place in every if place.step.get("pivot")), None)
    match view.status:
        case SagaStatus.COMPLETED:
            assert {place.path for place in every} == set(done)
            assert undone == back == []
        case SagaStatus.COMPENSATED:
            assert pivot not in done
            expected = [
                place.path for place in reversed(every)
                if place.step["undo"] and (place.path in done or (place.careful and place.path in unknown))
            ]  # fmt: skip
            assert undone == expected
            assert back == expected  # once each, for compensations are transactional
            # A call of a worker that was paused may come whenever it likes: nothing outside can be fenced.
            late = [step for step, undo in effects[effects.index((back[0], True)) :] if not undo] if back else []
            assert all(killed and not by_path[step].step["tx"] for step in late), "something was done after an undo"
        case status:
            assert status is SagaStatus.STUCK
            assert pivot in done
            assert undone == back == []
    for place in every:
        times = forward.count(place.path)
        if place.step["tx"]:
            assert times == (place.path in done), place.path
        elif place.path in done:
            assert times == 1 or (killed and times >= 1), (place.path, times)


async def effects_of(connection: Any, saga_id: UUID) -> list[tuple[str, bool]]:
    """What a saga did and undid, in order."""
    rows = await connection.fetch("SELECT step, undo FROM saga_effects WHERE saga_id = $1 ORDER BY place", saga_id)
    return [(row[0], row[1]) for row in rows]


def sagas_of_environment() -> list[Saga]:
    """The definitions that a test hands to its worker processes."""
    return [build(name, spec) for name, spec in json.loads(os.environ.get("SOMA_TEST_SAGAS", "{}")).items()]


SAGAS = sagas_of_environment()
