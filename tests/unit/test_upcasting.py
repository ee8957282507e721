"""Old payloads in the newest version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from soma_common.errors import ConfigurationError, PayloadInvalid
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.events.upcasting import Upcasters, typed
from tests.core_support import recorded


class OrderV1(Payload, event_type="order.placed", version=1):
    name: str


class OrderV3(Payload, event_type="order.placed", version=3):
    first: str
    last: str
    currency: str


def _split(payload: dict[str, Any]) -> dict[str, Any]:
    first, last = payload.pop("name").split(" ")
    return {**payload, "first": first, "last": last}


STEPS = {
    ("order.placed", 1): lambda payload: {**payload, "currency": "EUR"},
    ("order.placed", 2): _split,
}
OLD = {"name": "Ada Lovelace"}


def test_the_chain_leads_to_the_newest_version_and_leaves_the_old_payload_alone() -> None:
    event = recorded(dict(OLD))
    newest = Upcasters(STEPS).upcast(event)
    assert newest.payload == {"currency": "EUR", "first": "Ada", "last": "Lovelace"}
    assert (newest.schema_version, event.payload, event.schema_version) == (3, OLD, 1)


def test_newest_and_unknown_events_pass_unchanged() -> None:
    for event in (
        recorded({}, schema_version=3),
        recorded({}, schema_version=9),
        recorded({}, event_type="other.type"),
    ):
        assert Upcasters(STEPS).upcast(event) is event


@pytest.mark.parametrize("payload", [OLD, OrderV1(name="Ada Lovelace")])
def test_typed_gives_the_newest_model(payload: Any) -> None:
    models = PayloadModels(OrderV1, OrderV3)
    event = typed(recorded(payload), models, Upcasters(STEPS, models=models))
    assert event.payload == OrderV3(first="Ada", last="Lovelace", currency="EUR")
    assert event.schema_version == 3


def test_typed_without_a_model_gives_the_dict() -> None:
    event = recorded({"x": 1}, event_type="free.type")
    assert typed(event, PayloadModels(), Upcasters()) is event


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ({("a.b", 1): dict, ("a.b", 4): dict}, "no upcaster from v2, v3"),
        ({("a.b", 0): dict}, "no function from a version >= 1"),
        ({("a.b", 1): "text"}, "no function from a version >= 1"),
        ({("order.placed", 1): dict}, "end at v2, and its newest model is v3"),
        ({**STEPS, ("order.placed", 3): dict}, "end at v4, and its newest model is v3"),
    ],
)
def test_wrong_chains_are_found_when_they_are_made(steps: Mapping[Any, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Upcasters(steps, models=PayloadModels(OrderV1, OrderV3))


def test_a_failing_upcaster_is_one_named_error_with_the_event_in_it() -> None:
    with pytest.raises(PayloadInvalid, match=r"order\.placed v2 failed on event 00000000.*KeyError"):
        Upcasters(STEPS).upcast(recorded({}))


def test_an_upcaster_must_return_an_object() -> None:
    steps: Any = {("order.placed", 1): lambda payload: list(payload)}
    with pytest.raises(PayloadInvalid, match="returned a list"):
        Upcasters(steps).upcast(recorded(OLD))


def test_a_payload_that_does_not_match_after_all_names_the_field() -> None:
    with pytest.raises(PayloadInvalid, match="last"):
        typed(recorded({"first": "x", "currency": "EUR"}, schema_version=3), PayloadModels(OrderV3), Upcasters())


def test_it_is_a_mapping() -> None:
    upcasters = Upcasters(STEPS)
    assert dict(upcasters) == STEPS
    assert (len(upcasters), upcasters.newest("order.placed"), upcasters.newest("x")) == (2, 3, None)
