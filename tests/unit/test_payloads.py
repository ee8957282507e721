"""Payload models, their registry, and JSON."""

from __future__ import annotations

import pytest
from pydantic import ValidationError as PydanticError

from soma_common.errors import ConfigurationError, PayloadInvalid, ValidationError
from soma_common.events.payloads import Payload, PayloadModels, check_payload, to_json


class PlacedV1(Payload, event_type="order.placed"):
    """The first version."""

    n: int


class PlacedV2(Payload, event_type="order.placed", version=2):
    """The second version."""

    n: int
    note: str = ""


class Base(Payload):
    """Without a type: for inheriting only."""


MODELS = PayloadModels(PlacedV2, PlacedV1)


def test_models_are_found_by_type_and_version() -> None:
    assert MODELS["order.placed", 1] is PlacedV1
    assert MODELS.of("order.placed", 2) is PlacedV2
    assert MODELS.of("order.placed", 3) is None
    assert MODELS.latest("order.placed") == 2
    assert MODELS.latest("nothing") is None
    assert set(MODELS) == {("order.placed", 1), ("order.placed", 2)}
    assert len(MODELS) == 2


def test_a_model_without_a_type_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="Base has no event type"):
        PayloadModels(Base)


def test_two_models_of_one_version_are_a_mistake() -> None:
    class Other(Payload, event_type="order.placed", version=2):
        """Claims what is taken."""

    with pytest.raises(ConfigurationError, match=r"are both order.placed version 2"):
        PayloadModels(PlacedV2, Other)
    assert len(PayloadModels(PlacedV2, PlacedV2)) == 1


def test_a_bad_type_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ValidationError):

        class Bad(Payload, event_type="Not A Type"):
            """Never made."""


def test_payloads_are_checked_against_their_model() -> None:
    model = PlacedV1(n=1)
    assert check_payload(model, PlacedV1) is model
    assert check_payload({"n": 1}, PlacedV1) == model
    assert check_payload(model, PlacedV2) == PlacedV2(n=1)
    assert check_payload({"x": 1}, None) == {"x": 1}
    with pytest.raises(PayloadInvalid, match=r"PlacedV1 \(order.placed v1\): n: .*; m: "):
        check_payload({"n": "x", "m": 1}, PlacedV1)
    with pytest.raises(PayloadInvalid):
        check_payload("text", PlacedV1)


def test_payloads_are_frozen_and_closed() -> None:
    with pytest.raises(PydanticError):
        PlacedV1(n=1).n = 2  # type: ignore[misc]
    with pytest.raises(PydanticError):
        PlacedV1(n=1, m=2)  # type: ignore[call-arg]


def test_json_is_utf8_and_compact() -> None:
    assert to_json("payload", {"a": "ü", 1: [None]}, 100) == '{"a":"ü","1":[null]}'.encode()
    assert to_json("payload", PlacedV2(n=1), 100) == b'{"n":1,"note":""}'
