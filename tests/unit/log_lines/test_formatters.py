"""What the lines say: fields, markers, ids, data, errors."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel, Field, SecretStr

from soma_common import StreamKey, TraceContext
from soma_common.config import SomaConfig
from soma_common.errors import ConfigurationError
from soma_common.events.types import EventType
from soma_common.logging.context import log_context
from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.levels import SUCCESS
from soma_common.logging.markers import CATEGORIES, LEVELS, Marker
from soma_common.traced import Told
from tests.log_support import check_console, parsed, raised, record

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

as_json = SomaStackJSONFormatter(service="shop")
for_people = SomaStackFormatter(service="shop", emoji=True, colour=False)
in_ascii = SomaStackFormatter(service="shop", emoji=False, colour=False)


def line(*args: Any, **fields: Any) -> dict[str, Any]:
    return parsed(as_json.format(record(*args, **fields)))


def shown(*args: Any, **fields: Any) -> list[str]:
    return check_console(for_people.format(record(*args, **fields)))


def test_a_json_line_has_its_fields() -> None:
    found = line("order %s placed", "o-1", data={"cents": 4200}, user="c-1", created=1793698200.25)
    assert found == {
        "timestamp": "2026-11-03T09:30:00.250000+00:00",
        "level": "INFO",
        "service": "shop",
        "logger": "app.orders",
        "message": "order o-1 placed",
        "trace_id": None,
        "correlation_id": None,
        "tenant_id": None,
        "data": {"user": "c-1", "cents": 4200},
    }


def test_a_console_line_has_its_shape() -> None:
    text = shown("order placed", trace_id=TRACE, created=datetime(2026, 11, 3, 9, 30, 0, 250_000).timestamp())
    assert text == ["ℹ️ 09:30:00.250 [shop] 🔗0af76519 INFO order placed"]
    assert shown("order placed", created=datetime(2026, 11, 3, 9, 30).timestamp()) == [
        "ℹ️ 09:30:00.000 [shop] INFO order placed"
    ]


def test_data_is_indented() -> None:
    text = shown("placed", data={"order": {"id": "o-1", "items": ["lamp", {"rug": 2}], "none": {}}}, express=True)
    assert text[1:] == [
        "    express: true",
        "    order:",
        "      id: o-1",
        "      items:",
        "        - lamp",
        "        -",
        "          rug: 2",
        "      none: {}",
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_has_its_marker(level: int) -> None:
    assert shown(level=level)[0].startswith(LEVELS[level].emoji)
    assert in_ascii.format(record(level=level)).startswith(f"{LEVELS[level].ascii} ")
    assert f" {logging.getLevelName(level)} said" in shown(level=level)[0]


def test_levels_between_have_the_marker_of_the_one_below() -> None:
    assert shown(level=35)[0].startswith("⚠️")
    assert shown(level=99)[0].startswith("❌")
    assert shown(level=1)[0].startswith("🔍")


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_has_its_marker(category: str) -> None:
    mark = CATEGORIES[category]
    assert shown(category=category)[0].startswith(mark.emoji)
    assert shown(category=category.lower())[0].startswith(mark.emoji)
    assert in_ascii.format(record(category=category)).isascii()
    assert line(category=category)["category"] == category
    assert "category" not in line(category=category)["data"]


@pytest.mark.parametrize(
    ("event_type", "category"),
    [
        (EventType.MEMORY_STORED, "MEMORY"),
        ("agent.task.started", "AGENT"),
        ("cognitive.state.changed", "COGNITIVE"),
        ("voice.heard", "VOICE"),
        ("saga.completed", "SAGA"),
        ("txn.committed", "TXN"),
        ("dlq.buried", "DLQ"),
        ("order.placed", "EVENT"),
    ],
)
def test_an_event_type_gives_the_category(event_type: str, category: str) -> None:
    assert shown(event_type=event_type)[0].startswith(CATEGORIES[category].emoji)
    found = line(event_type=event_type)
    assert (found["category"], found["data"]) == (category, {"event_type": str(event_type)})


def test_a_problem_is_marked_as_one_whatever_it_is_about() -> None:
    assert shown(level=logging.ERROR, category="AGENT")[0].startswith("❌")
    assert shown(level=SUCCESS, category="AGENT")[0].startswith("🤖")


def test_own_categories() -> None:
    formatter = SomaStackFormatter(
        service="shop", emoji=True, colour=False, categories={"billing": Marker("💶", "bill")}
    )
    assert formatter.format(record(category="BILLING")).startswith("💶")
    assert formatter.format(record(event_type="billing.paid")).startswith("💶")
    known = SomaStackJSONFormatter(service="shop", categories=["billing"])
    assert parsed(known.format(record(event_type="billing.paid")))["category"] == "BILLING"
    assert shown(category="NOBODY_KNOWS")[0].startswith("ℹ️")


def test_colours_are_around_what_they_colour_and_nothing_else_escapes() -> None:
    formatter = SomaStackFormatter(service="shop", emoji=True, colour=True)
    text = formatter.format(record("bad \x1b[31m", level=logging.ERROR))
    assert "\x1b[31mERROR\x1b[0m bad \\x1b[31m" in text
    assert text.count("\x1b") == 4


def test_ids_of_the_record_come_first_then_the_span_then_the_context() -> None:
    context = TraceContext("1" * 32, "2" * 16)
    with log_context(trace=context, correlation_id="c-1", tenant_id="acme"):
        found = line()
        assert (found["trace_id"], found["span_id"]) == (context.trace_id, context.span_id)
        assert (found["correlation_id"], found["tenant_id"]) == ("c-1", "acme")
        with TracerProvider(shutdown_on_exit=False).get_tracer("tests").start_as_current_span("work") as span:
            inside = span.get_span_context()
            found = line()
            assert (found["trace_id"], found["span_id"]) == (f"{inside.trace_id:032x}", f"{inside.span_id:016x}")
            assert found["correlation_id"] == "c-1"
            found = line(trace_id=TRACE, tenant_id="other", correlation_id=UUID(int=7))
            assert (found["trace_id"], found["tenant_id"], found["correlation_id"]) == (
                TRACE,
                "other",
                str(UUID(int=7)),
            )
            assert "span_id" not in found  # that of another trace
    assert line()["trace_id"] is None


def test_numbers_as_opentelemetry_has_them_are_ids() -> None:
    found = line(trace_id=int(TRACE, 16), span_id=int(SPAN, 16))
    assert (found["trace_id"], found["span_id"]) == (TRACE, SPAN)
    with trace.use_span(trace.INVALID_SPAN):
        assert line()["trace_id"] is None


def test_what_instrumentation_puts_on_records_is_not_data() -> None:
    assert (
        line(otelTraceID=TRACE, otelSpanID=SPAN, otelTraceSampled=True, otelServiceName="x", taskName="t")["data"] == {}
    )


def test_contexts_nest_and_end() -> None:
    with log_context(tenant_id="acme"), log_context(correlation_id="c-1"):
        assert (line()["tenant_id"], line()["correlation_id"]) == ("acme", "c-1")
    assert line()["tenant_id"] is None


class Colour(Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


class Customer(BaseModel):
    name: str
    pin: SecretStr
    note: str = Field("kept out", repr=False)


@dataclass
class Account:
    owner: str
    number: str = field(repr=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "0:01:30"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (Colour.RED, "red"),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (Point(1, 2), {"x": 1, "y": 2}),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (deque([1]), "deque([1])"),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (
            {1: "a", None: "b", (1, 2): "c", Colour.RED: "d", False: "e"},
            {"1": "a", "false": "e", "null": "b", "(1, 2)": "c", "red": "d"},
        ),
        (float("nan"), None),
        (float("inf"), None),
        (2**64, str(2**64)),
        (-(2**70), str(-(2**70))),
        (Path("/tmp/x"), "/tmp/x"),
        (ValueError("no"), "ValueError: no"),
        (Customer, f"{__name__}.Customer"),
        (StreamKey("acme", "order", "o-1"), {"tenant_id": "acme", "aggregate_type": "order", "aggregate_id": "o-1"}),
        (Customer(name="Ann", pin=SecretStr("1234")), {"name": "Ann", "pin": "***"}),
        (Account("Ann", "DE00"), {"owner": "Ann"}),
        ("\ud800", "\\ud800"),
        (10**5000, hex(10**5000)),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_as_json(value: Any, expected: Any) -> None:
    assert line(value=value)["data"]["value"] == expected
    assert line(value=[{"deep": value}])["data"]["value"][0]["deep"] == expected


def test_a_configuration_keeps_its_secrets() -> None:
    config = SomaConfig(postgres_dsn="postgresql://u:hunter2@h/d", registry_token="hunter2")
    assert "hunter2" not in as_json.format(record("%s", config, config=config))


def test_an_exception_is_fields_in_json_and_a_traceback_on_the_console() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        info = raised(error)
    failure = line("failed", exc_info=info, level=logging.ERROR)["exception"]
    assert (failure["type"], failure["message"]) == ("ValueError", "second")
    assert "KeyError: 'first'" in failure["stacktrace"]
    assert failure["stacktrace"].endswith("ValueError: second")
    text = shown("failed", exc_info=info)
    assert text[1] == "    Traceback (most recent call last):"
    assert text[-1] == "    ValueError: second"


def test_groups_and_notes_are_told() -> None:
    error = ExceptionGroup("several", [ValueError("one"), ExceptionGroup("inner", [KeyError("two")])])
    error.add_note("look here")
    failure = line(exc_info=raised(error))["exception"]
    assert failure["type"] == "ExceptionGroup"
    for part in ("ValueError: one", "KeyError: 'two'", "look here"):
        assert part in failure["stacktrace"]


def test_errors_of_the_library_are_named_with_their_module() -> None:
    assert (
        line(exc_info=raised(ConfigurationError("no")))["exception"]["type"] == "soma_common.errors.ConfigurationError"
    )


def test_the_text_of_an_error_from_another_process() -> None:
    failure = line(exc_text="Traceback …\nValueError: no")["exception"]
    assert failure == {"type": "", "message": "", "stacktrace": "Traceback …\nValueError: no"}


def test_stack_info() -> None:
    assert line(stack_info="Stack (most recent call last):\n  File")["stack"].startswith("Stack")
    assert shown(stack_info="Stack (most recent call last):\n  File")[1:] == [
        "    Stack (most recent call last):",
        "      File",
    ]


def test_the_record_stays_as_it_was() -> None:
    given = record("said %s", "x", exc_info=raised(ValueError()), data={"a": 1}, trace_id=TRACE, category="AGENT")
    before = dict(given.__dict__)
    as_json.format(given)
    for_people.format(given)
    assert given.__dict__ == before


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="limit is 999"):
        SomaStackJSONFormatter(limit=999)
    with pytest.raises(ConfigurationError, match="negative"):
        SomaStackFormatter(limit=-1)
    with pytest.raises(ConfigurationError, match="shape of its own"):
        SomaStackJSONFormatter("%(message)s")


def test_the_service_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMA_SERVICE_ID", "brain")
    assert parsed(SomaStackJSONFormatter().format(record()))["service"] == "brain"
    monkeypatch.setenv("SOMA_SERVICE_ID", "No name")
    with pytest.raises(ConfigurationError, match="not a service name"):
        SomaStackFormatter()


def test_a_traced_call_gives_its_ids() -> None:
    told = Told(name="buy", tenant_id="acme", correlation_id="c-1")
    with told.begin((), {}, None).inside() as call:
        found = line()
        assert (found["trace_id"], found["tenant_id"], found["correlation_id"]) == (call.trace.trace_id, "acme", "c-1")
    assert line()["trace_id"] is None
