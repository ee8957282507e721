"""Definitions as Mermaid: the whole text, since that is what people paste."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import pytest

from soma_common.errors import ValidationError
from soma_common.sagas.graph import mermaid, mermaid_of_shape
from soma_common.sagas.models import (
    ForEach,
    From,
    Parallel,
    Saga,
    SagaStep,
    Signal,
    SubSaga,
    Timer,
    Tx,
    When,
    shape,
    with_compensation,
)

# What a label may consist of: nothing that Mermaid or a browser would take for more than text.
LABEL = r'"(?:[\w \-.,:?+()/]|#\d+;)*"'
NODE = rf"n\d+(?:\(\[{LABEL}\]\)|\[{LABEL}\]|\{{\{{{LABEL}\}}\}}|\{{{LABEL}\}}|\({LABEL}\)|\(\({LABEL}\)\))"
EDGE = rf"n\d+ (?:-->(?:\|{LABEL}\|)?|-\. {LABEL} \.->) n\d+"
LINE = re.compile(rf"flowchart TD|\s+(?:%% [\w :.]+|{NODE}|{EDGE}|subgraph g\d+\[{LABEL}\]|end)")


async def free(order: str, tx: Tx) -> None: ...


@with_compensation(free)
async def reserve(order: str, tx: Tx) -> int:
    return 1


async def refund(order: str) -> None: ...


@with_compensation(refund)
async def pay(order: str) -> int:
    return 1


async def pack(item: Annotated[str, From("items")]) -> int:
    return 1


async def unpack(item: Annotated[str, From("items")]) -> None: ...


async def ship(order: str, tx: Tx) -> None: ...


async def mail(order: str) -> None: ...


def is_express(order: str) -> bool:
    return True


def items(order: str) -> list[str]:
    return []


def book(name: str) -> SagaStep:
    return SagaStep(pay, name=name)


everything = Saga(
    "place-order", str, reserve,
    Parallel([book("fly"), book("sleep")], book("drive")),
    When(is_express, book("courier"), otherwise=book("post")),
    When(is_express, book("gift"), name="is-gift"),
    ForEach(items, SagaStep(pack, unpack), at_once=3),
    Timer("cool-off", 3600), Signal("approved", timeout_seconds=60.0), Signal("seen"),
    SubSaga(Saga("billing", str, pay, version=2)),
    SagaStep(ship, pivot=True),
    book("insure"), mail, version=3,
)  # fmt: skip

EVERYTHING = """\
flowchart TD
    n1(["place-order v3"])
    n2["reserve (tx)"]
    subgraph g3["at once"]
        n4(("+"))
        n5["fly"]
        n6["sleep"]
        n7["drive"]
        n8(("+"))
    end
    n9{"is-express?"}
    n10["courier"]
    n11["post"]
    n12{"is-gift?"}
    n13["gift"]
    subgraph g14["for each items, 3 at once"]
        n15["pack"]
    end
    n16("timer cool-off, 3600 s")
    n17("signal approved, at most 60 s")
    n18("signal seen")
    subgraph g19["saga billing v2"]
        n20["pay"]
    end
    n21{{"ship (tx, pivot)"}}
    n22["insure"]
    n23["mail"]
    n24(["completed"])
    n1 --> n2
    n2 --> n4
    n4 --> n5
    n5 --> n6
    n4 --> n7
    n6 --> n8
    n7 --> n8
    n8 --> n9
    n9 -->|"yes"| n10
    n9 -->|"no"| n11
    n10 --> n12
    n11 --> n12
    n12 -->|"yes"| n13
    n13 --> n15
    n12 -->|"no"| n15
    n15 --> n16
    n16 --> n17
    n17 --> n18
    n18 --> n20
    n20 --> n21
    n21 --> n22
    n22 --> n23
    n23 --> n24
    n2 -. "undo: free" .-> n1
    n5 -. "undo: refund" .-> n2
    n6 -. "undo: refund" .-> n5
    n7 -. "undo: refund" .-> n6
    n10 -. "undo: refund" .-> n7
    n11 -. "undo: refund" .-> n7
    n13 -. "undo: refund" .-> n10
    n13 -. "undo: refund" .-> n11
    n15 -. "undo: unpack" .-> n13
    n15 -. "undo: unpack" .-> n10
    n15 -. "undo: unpack" .-> n11
    n20 -. "undo: refund" .-> n15
"""

SHAPED = """\
flowchart TD
    %% As workers registered it: without compensations.
    n1(["small v1"])
    n2["reserve"]
    subgraph g3["at once"]
        n4(("+"))
        n5("timer soon")
        n6["mail"]
        n7(("+"))
    end
    n8{"is-express?"}
    n9["pay"]
    subgraph g10["for each items"]
        n11["pack"]
    end
    subgraph g12["bill: saga billing v2"]
        n13["pay"]
    end
    n14{{"ship (pivot)"}}
    n15("signal approved")
    n16(["completed"])
    n1 --> n2
    n2 --> n4
    n4 --> n5
    n4 --> n6
    n5 --> n7
    n6 --> n7
    n7 --> n8
    n8 -->|"yes"| n9
    n9 --> n11
    n8 -->|"no"| n11
    n11 --> n13
    n13 --> n14
    n14 --> n15
    n15 --> n16
"""


def test_everything_that_a_definition_may_have_is_drawn() -> None:
    assert mermaid(everything) == EVERYTHING


def test_what_the_database_knows_is_drawn_without_compensations() -> None:
    saga = Saga(
        "small", str, reserve, Parallel(Timer("soon", 1), mail), When(is_express, pay), ForEach(items, pack),
        SubSaga(Saga("billing", str, pay, version=2), name="bill"), SagaStep(ship, pivot=True), Signal("approved"),
    )  # fmt: skip
    stored = json.loads(json.dumps(shape(saga.parts)))
    assert mermaid_of_shape("small", 1, stored) == SHAPED


def test_where_every_way_has_a_pivot_there_is_no_way_back() -> None:
    def pivot(name: str) -> SagaStep:
        return SagaStep(ship, pivot=True, name=name)

    both = Saga("both", str, reserve, When(is_express, pivot("a"), otherwise=pivot("b")), pay)
    one = Saga("one", str, reserve, When(is_express, pivot("a"), otherwise=mail), pay)
    inner = Saga("inner", str, reserve, SubSaga(Saga("sub", str, pivot("a"))), pay)
    assert [mermaid(saga).count(" -. ") for saga in (both, one, inner)] == [1, 2, 1]


HOSTILE = [
    'a"] --> n1',
    "<img src=x onerror=alert(1)>",
    "end",
    "`**x**`",
    "#quot;",
    "a|b{c}[d]%%",
    "\u202egnp",
    "x;y\\",
]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.isprintable()])
def test_names_stay_text(name: str) -> None:
    async def undo() -> None: ...

    undo.__name__ = name + "\n\x1b[31m"
    text = mermaid(Saga(name, str, SagaStep(mail, undo)))
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", [*HOSTILE, "a\nclick n1 href", "\x9b2J"])
def test_names_of_the_database_stay_text(name: str) -> None:
    hostile: list[Any] = [
        ["step", name],
        ["when", name, [["timer", name]], []],
        ["saga", name, name, 1, [["step", name]]],
    ]
    text = mermaid_of_shape(name, 1, hostile)
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    "broken", [[["step"]], [[]], [3], [["when", "a", 1, 2]], [["saga", "x"]], None, [[["a"], "b"]]]
)
def test_what_is_no_shape_is_refused(broken: Any) -> None:
    with pytest.raises(ValidationError, match="cannot be drawn"):
        mermaid_of_shape("x", 1, broken)
