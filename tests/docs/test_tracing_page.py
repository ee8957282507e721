"""The page of spans says what the code says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from soma_common.consumer.source import Partition
from soma_common.sagas.context import SagaContext
from soma_common.tracing import conventions
from tests.core_support import recorded

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "tracing.md").read_text()
SPANS = dict(re.findall(r"^\| `([^`]+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE))
ATTRIBUTES = set(re.findall(r"^\| `([a-z_.]+)` \| ", PAGE, re.MULTILINE)) - SPANS.keys()


def spans() -> list[conventions.Doing]:
    event = recorded({})
    step: dict[str, Any] = {
        "saga_id": event.event_id, "saga": "{saga}", "version": 1, "step": "{step}", "attempt": 1, "tenant_id": "t",
        "correlation_id": "c",
    }  # fmt: skip
    run, place = SimpleNamespace(run_id=1, mode="force"), (Partition("{destination}", 0), 7)
    return [
        conventions.requesting("GET", "/a", "http"),
        conventions.transaction(),
        conventions.appending(["{destination}"], [event]),
        conventions.sending("{destination}", 0, 2),
        conventions.processing("{consumer}", [event], place, "live"),
        conventions.processing("{consumer}", [event, event], place, "live"),
        conventions.settling("{consumer}", "{destination}", 2),
        conventions.starting(SimpleNamespace(name="{saga}")),
        conventions.stepping(SagaContext(**step)),
        conventions.stepping(SagaContext(**step, undoing=True)),
        conventions.replaying("{consumer}", run),
    ]


def test_names_and_kinds() -> None:
    known = {span.name.replace("GET", "{method} {route}"): span.kind for span in spans()}
    assert known == SPANS


def test_attributes() -> None:
    used = set[str]()
    for span in spans():
        used |= span.attributes.keys() | (span.more() if span.more else {}).keys()
    later = {conventions.STATUS, conventions.ROUTE, conventions.ERROR_TYPE}
    assert used | later == ATTRIBUTES
    constants = {
        value for name, value in vars(conventions).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str) and name != "LOG"
    }  # fmt: skip
    assert constants == ATTRIBUTES


def test_they_are_those_of_opentelemetry() -> None:
    from opentelemetry.semconv._incubating.attributes import (
        error_attributes, http_attributes, messaging_attributes, url_attributes,
    )  # fmt: skip

    modules = (error_attributes, http_attributes, messaging_attributes, url_attributes)
    known = {value for module in modules for name, value in vars(module).items() if name.isupper()}
    assert {name for name in ATTRIBUTES if not name.startswith("soma.")} <= known
    deprecated = {"messaging.operation", "messaging.kafka.message.offset", "messaging.kafka.destination.partition"}
    assert not ATTRIBUTES & deprecated
    types = {kind.value for kind in messaging_attributes.MessagingOperationTypeValues}
    operations = [span.attributes.get(conventions.OPERATION_TYPE) for span in spans()]
    assert {kind for kind in operations if kind} == {"create", "send", "process", "settle"} <= types


def test_a_destination_that_is_not_one_is_left_out() -> None:
    event = recorded({})
    assert conventions.appending(["a", "b"], [event, event]).name == "append"
    assert conventions.appending([None], [event]).name == "append soma.events"
    letter = conventions.processing("c", [event], None, "redrive")
    assert (letter.name, letter.attributes.get(conventions.DESTINATION)) == ("process", None)
    assert conventions.requesting("HACK", "/", "http").attributes[conventions.METHOD] == "_OTHER"
