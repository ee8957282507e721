"""Strategies for payloads: within every constraint, and nothing that the log cannot keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    conlist,
    create_model,
    model_validator,
)

from soma_common.events.payloads import Payload
from soma_common.testing.strategies import events, payloads, recorded_events, values
from tests.property.codec_values import SCALARS, json_of

RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


class Line(BaseModel):
    sku: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}-\d{3}$")]
    count: int = Field(gt=0, le=10)
    price: Annotated[Decimal, Field(ge=0, decimal_places=2)]


class Placed(Payload, event_type="order.placed", version=2):
    order: str = Field(min_length=1, max_length=5)
    lines: Annotated[list[Line], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, lt=2.5)]
    boxes: Annotated[int, Field(multiple_of=6, ge=1, lt=60)] = 6
    tags: conlist(NonNegativeInt, min_length=2, max_length=2)  # type: ignore[valid-type]
    due: date | None = None


class Tree(Payload, event_type="tree.grown"):
    name: str
    branches: list[Tree] = Field(default_factory=list)


class Ordered(Payload, event_type="span.seen"):
    """A rule that no field tells."""

    first: int = Field(ge=0, le=20)
    last: int = Field(ge=0, le=20)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first > self.last:
            raise ValueError("first comes first")
        return self


class Aliased(Payload, event_type="alias.used"):
    model_config = ConfigDict(serialize_by_alias=True)
    total: int = Field(alias="totalCents")
    other: int = Field(validation_alias=AliasChoices("otherCents", "other"))


@RELAXED
@given(payloads(Placed))
def test_constraints_are_kept(placed: Placed) -> None:
    assert 1 <= len(placed.order) <= 5
    assert 0 < placed.weight < 2.5
    assert placed.boxes % 6 == 0
    assert 6 <= placed.boxes < 60
    assert len(placed.tags) == 2
    for line in placed.lines:
        assert re.fullmatch(r"[A-Z]{2}-\d{3}", line.sku)
        assert 0 < line.count <= 10
        assert line.price >= 0
    assert Placed.model_validate_json(json_of(placed)) == placed


@RELAXED
@given(st.data())
def test_any_model_survives_its_json(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(SCALARS), min_size=1, max_size=4))
    fields: dict[str, Any] = {f"field_{n}": (kind, ...) for n, (kind, _) in enumerate(kinds)}
    fields |= {"more": (Sequence[kinds[0][0]], ...), "named": (Mapping[str, kinds[0][0]], ...)}
    model = create_model("Made", __base__=Payload, __cls_kwargs__={"event_type": "made.up"}, **fields)
    payload = data.draw(payloads(model))
    assert isinstance(payload, Payload)
    assert json_of(model.model_validate_json(json_of(payload))) == json_of(payload)


@RELAXED
@given(payloads(Tree), payloads(Ordered), payloads(Aliased))
def test_models_within_themselves_with_rules_and_with_aliases(tree: Tree, ordered: Ordered, aliased: Aliased) -> None:
    assert all(isinstance(branch, Tree) for branch in tree.branches)
    assert ordered.first <= ordered.last
    assert isinstance(aliased.total + aliased.other, int)


@RELAXED
@given(payloads(Placed, order="o-1", boxes=st.sampled_from([12, 18])))
def test_fields_can_be_fixed(placed: Placed) -> None:
    assert placed.order == "o-1"
    assert placed.boxes in (12, 18)


@RELAXED
@given(events(Placed, Tree, tenant_id="acme"), recorded_events(Tree, version=st.integers(1, 5)))
def test_events_around_them(event: Any, recorded: Any) -> None:
    assert event.tenant_id == "acme"
    assert event.event_type in ("order.placed", "tree.grown")
    assert isinstance(recorded.payload, Tree)
    assert 1 <= recorded.version <= 5
    assert recorded.event_type == "tree.grown"
    assert len(recorded.trace_id) == 32


@RELAXED
@given(values(Annotated[float, Field(ge=1)]), values(dict[str, tuple[int, ...]]), values(frozenset[bool]))
def test_values_of_types(number: float, mapping: dict[str, tuple[int, ...]], bools: frozenset[bool]) -> None:
    assert number >= 1
    assert math.isfinite(number)
    assert all(isinstance(each, tuple) for each in mapping.values())
    assert bools <= {True, False}


def test_what_is_not_known_is_named() -> None:
    class Odd(Payload, event_type="odd.one"):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        pattern: re.Pattern[str] | object

    class Deep(Payload, event_type="deep.one"):
        inner: int = Field(validation_alias=AliasPath("outer", 0))

    with pytest.raises(TypeError, match="pattern: nothing is known here of"):
        payloads(Odd)
    with pytest.raises(TypeError, match="inner: it is taken out of another field"):
        payloads(Deep)
    with pytest.raises(ValueError, match="Tree has no field nmae; it has name, branches"):
        payloads(Tree, nmae="x")
