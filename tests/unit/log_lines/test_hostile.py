"""Records that want to do harm, or come from broken code: each gives one line. docs/reference/logging.md has the table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.text import TRUNCATED, cut, cut_middle
from tests.log_support import check_console, parsed, raised, record

as_json = SomaStackJSONFormatter(service="shop")
for_people = SomaStackFormatter(service="shop", emoji=True, colour=False)
FAKE = "ok\n✅ 09:30:00.000 [shop] SUCCESS paid"


def both(given: logging.LogRecord) -> tuple[dict[str, Any], list[str]]:
    """The JSON and the console's lines of a record; both are valid."""
    return parsed(as_json.format(given)), check_console(for_people.format(given))


class Broken:
    """Raises whatever it is asked."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Endless:
    def __str__(self) -> str:
        return str(self)


class Evil(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Unreadable(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no value")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys")

    def __len__(self) -> int:
        return 1


class Greedy:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class NotText(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass
class Node:
    name: str
    next: Any = None


class Model(BaseModel):
    value: Any


def test_a_line_break_in_a_message_begins_no_line() -> None:
    found, text = both(record("user %s", FAKE))
    assert found["message"] == f"user {FAKE}"
    assert len(text) == 1
    assert "ok\\n✅" in text[0]


def test_a_line_break_in_data_or_ids_begins_no_line() -> None:
    _, text = both(record(data={"name": FAKE, FAKE: 1, "list": [FAKE]}, trace_id=FAKE, tenant_id=FAKE, category=FAKE))
    assert len(text) == 5


def test_a_line_break_in_the_names_of_level_logger_and_service_begins_no_line() -> None:
    given = record(levelname=FAKE, name=FAKE)
    parsed(SomaStackJSONFormatter(service=FAKE).format(given))
    assert len(check_console(SomaStackFormatter(service=FAKE, emoji=True, colour=False).format(given))) == 1


def test_a_traceback_with_a_line_break_cannot_fake_a_record() -> None:
    _, text = both(record(exc_info=raised(ValueError(FAKE))))
    assert "    ✅ 09:30:00.000 [shop] SUCCESS paid" in text


@pytest.mark.parametrize(
    "text",
    ["\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08\x08", "\x00", "\x7f", "\x85", "\u2028", "\u2029"],
    ids=ascii,
)
def test_control_characters_steer_nothing(text: str) -> None:
    found, _ = both(record(f"a{text}b", data={"k": text, f"k{text}": 1}, exc_info=raised(ValueError(text))))
    assert found["message"] == f"a{text}b"  # JSON says it, in escapes


@pytest.mark.parametrize("text", ["\u202e", "\u2066", "\u200f", "\u061c", "\u200b", "\ufeff", "\U000e0041"], ids=ascii)
def test_bidirectional_and_invisible_characters_are_shown(text: str) -> None:
    found, lines = both(record(f"a{text}b", data={"k": text}))
    assert found["message"] == f"a{text}b"
    assert text not in "".join(lines)


def test_lone_surrogates() -> None:
    found, _ = both(record("a\ud800b", data={"\udfff": "\udcff", "list": ["\ud800"]}, tenant_id="\ud800"))
    assert found["message"] == "a\\ud800b"
    assert found["data"] == {"\\udfff": "\\udcff", "list": ["\\ud800"]}


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("%s and %s", ("one",)),
        ("none", ("one", "two")),
        ("%d", ("text",)),
        ("%(name)s", ({"other": 1},)),
        ("100%", ("x",)),
        ("%z", ("x",)),
        ("%s", (Broken(),)),
        ("%s %s", (Broken(),)),
        ("%c", (-1,)),
        ("%d", (10**5000,)),
    ],
)
def test_arguments_that_do_not_fit_the_message(message: str, args: tuple[Any, ...]) -> None:
    found, _ = both(record(message, *args))
    assert found["message"].startswith(message[:3])


def test_messages_that_are_no_text() -> None:
    assert both(record(None))[0]["message"] == "None"
    assert both(record({"a": 1}))[0]["message"] == "{'a': 1}"
    assert "Broken" in both(record(Broken()))[0]["message"]
    assert both(record(b"raw"))[0]["message"] == "b'raw'"
    assert both(record(Endless()))[0]["message"].startswith("<unprintable")


@pytest.mark.parametrize(
    "value", [Broken(), Endless(), Evil(), Unreadable(), Greedy(), NotText("x"), Model(value=Broken()), Node("a", Broken())],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_that_raise(value: Any) -> None:
    both(record("%s", value, value=value, data={"list": [value], "nested": {"value": value}}))
    both(record(value, trace_id=value, category=value, event_type=value, tenant_id=value))
    both(record(data=value))
    both(record(data={1: {"k": value}}))


def test_values_that_contain_themselves() -> None:
    listed: list[Any] = []
    listed.append(listed)
    mapped: dict[str, Any] = {"list": listed}
    mapped["self"] = mapped
    node = Node("a")
    node.next = node
    found, _ = both(record(data={"listed": listed, "mapped": mapped, "node": node}))
    assert found["data"]["listed"] == ["[circular]"]
    assert found["data"]["node"] == {"name": "a", "next": "[circular]"}


def test_values_that_are_too_deep() -> None:
    deep: Any = "end"
    for _ in range(10_000):
        deep = [deep]
    found, _ = both(record(data={"deep": deep}))
    assert TRUNCATED in str(found["data"])


def test_values_that_are_too_wide() -> None:
    found, text = both(record(data={"list": list(range(100_000)), "map": {str(n): n for n in range(100_000)}}))
    assert TRUNCATED in str(found["data"])
    assert sum(map(len, text)) < 2500
    both(record(data={"odd": [object()] * 5000, (1, 2): {n: object() for n in range(5000)}}))


def test_long_texts_are_cut() -> None:
    found, text = both(record("m" * 1_000_000, data={"k": "v" * 1_000_000, "v" * 100_000: 1}))
    assert found["message"].endswith(TRUNCATED)
    assert found["data"]["k"].endswith(TRUNCATED)
    assert text[0].endswith(TRUNCATED)
    assert text[-1].endswith(TRUNCATED)


def test_data_is_cut_at_500_characters_on_the_console() -> None:
    text = for_people.format(record(data={"k": "v" * 497}))
    assert text.endswith("v" * 497)
    cut_text = for_people.format(record(data={"k": "v" * 498}))
    assert cut_text.endswith("v" * 497 + TRUNCATED)


def test_a_long_traceback_keeps_its_end() -> None:
    error: Exception = ValueError("first")
    for number in range(300):
        try:
            raise ValueError(f"number {number} {'x' * 200}") from error
        except ValueError as raised_error:
            error = raised_error
    found, text = both(record(exc_info=raised(error)))
    assert found["exception"]["stacktrace"].startswith("ValueError: first")
    assert found["exception"]["stacktrace"].endswith("x" * 200)
    assert TRUNCATED in found["exception"]["stacktrace"]
    assert any(TRUNCATED in line for line in text)


def test_every_field_too_long_at_once() -> None:
    long = "🦆" * 20_000
    given = record(
        long, levelname=long, name=long, trace_id=long, span_id=long, correlation_id=long, tenant_id=long, category=long,
        data={long: long}, exc_info=raised(ValueError(long)), stack_info=long,
    )  # fmt: skip
    both(given)
    assert len(SomaStackJSONFormatter(service=long, limit=1000).format(given)) <= 1000
    parsed(SomaStackJSONFormatter(service=long, limit=1000).format(given), limit=1000)


@pytest.mark.parametrize(
    "character", ["é", "🦆", "👩\u200d💻", "👍🏽", "🇩🇪", "⚠️", "❤️\u200d🔥", "ş̣́"], ids=ascii
)  # fmt: skip
def test_a_cut_is_never_inside_of_a_character(character: str) -> None:
    text = character * 30
    for limit in range(len(character) * 4, len(text) - 1):
        kept = cut(text, limit).removesuffix(TRUNCATED)
        assert kept == character * (len(kept) // len(character))
        start, _, end = cut_middle(text, limit).partition(TRUNCATED)
        assert start == character * (len(start) // len(character))
        assert end == character * (len(end) // len(character))


def test_text_that_is_nothing_but_accents_is_cut_all_the_same() -> None:
    assert len(cut("\u0301" * 1000, 100)) <= 100 + len(TRUNCATED)
    assert cut("abc", 0) == TRUNCATED
    assert cut("", 0) == ""


@pytest.mark.parametrize("info", [True, (None, None, None), (), (1, 2), "text", 1, ValueError("bare")], ids=repr)
def test_exc_info_that_is_none(info: Any) -> None:
    both(record(exc_info=info))


def test_errors_that_cannot_be_told() -> None:
    found, _ = both(record(exc_info=raised(Evil())))
    assert found["exception"]["type"].endswith("Evil")
    chained = ValueError("outer")
    chained.__cause__ = chained
    both(record(exc_info=raised(chained)))
    both(record(exc_info=raised(ExceptionGroup("g", [Evil(), ExceptionGroup("h", [Evil()])]))))
    both(record(exc_info=raised(KeyboardInterrupt())))


def test_a_recursion_error_is_told() -> None:
    def deeper() -> None:
        deeper()

    try:
        deeper()
    except RecursionError:
        both(record(exc_info=sys.exc_info()))


@pytest.mark.parametrize("created", [float("nan"), float("inf"), -1.0, 1e30, None, "now", 10**400], ids=repr)
def test_times_that_are_none(created: Any) -> None:
    both(record(created=created))


@pytest.mark.parametrize("name", ["levelname", "levelno", "name", "msg", "args", "stack_info", "exc_text", "thread"])
@pytest.mark.parametrize(
    "value", [None, 1, "x", b"x", ["x"], {"x": 1}, Broken(), object()], ids=lambda value: type(value).__name__
)
def test_attributes_of_a_wrong_kind(name: str, value: Any) -> None:
    both(record(**{name: value}))


def test_a_record_without_its_attributes() -> None:
    given = record()
    del given.__dict__["levelname"], given.__dict__["created"], given.__dict__["name"]
    both(given)


def test_keys_that_look_like_fields_stay_in_the_data() -> None:
    found, _ = both(record(data={"timestamp": "x", "level": "y", "message": "z", "service": "w", "data": {"a": 1}}))
    assert found["message"] == "said"
    assert found["data"]["level"] == "y"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1", "utf-16", "cp932", "koi8-r"])
def test_encodings_that_lack_characters(encoding: str) -> None:
    class Stream:
        pass

    stream: Any = Stream()
    stream.encoding = encoding
    formatter = SomaStackFormatter(service="shop", stream=stream)
    text = formatter.format(record("ünïcödé 🦆 日本 \ud800", data={"k": "🦆"}, trace_id="0" * 32))
    check_console(text, encoding=encoding)
