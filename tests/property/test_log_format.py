"""Log format: any record gives one valid line (properties 28.1 and 28.2), and no secret is in it."""

from __future__ import annotations

import logging
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.text import TRUNCATED, cut, cut_middle, plain
from tests.log_support import check_console, parsed, raised

CANARY = "hunter2Canary"


class Broken:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


# Any text, with control characters, bidirectional ones and lone surrogates; often with what a line is made of.
anything = st.text(st.characters(exclude_categories=[]), max_size=40)
pieces = [
    "\n",
    "\r\n",
    "\x1b[31m",
    "\u202e",
    "\u2028",
    "\ud800",
    "%s",
    "%",
    "://a:b@c",
    "password=",
    '"',
    "\\",
    "{",
    "🔗",
    "🇩🇪",
    "[truncated]",
]
text = anything | st.lists(st.sampled_from(pieces) | anything, max_size=6).map("".join)
scalar = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | st.floats() | text | st.binary(max_size=20)
    | st.decimals() | st.uuids() | st.datetimes() | st.dates() | st.timedeltas() | st.complex_numbers()
    | st.builds(Broken) | st.builds(object) | text.map(ValueError) | st.sampled_from([int, Broken, ...])
)  # fmt: skip
key = text | st.integers() | st.none() | st.binary(max_size=5) | st.tuples(st.integers())
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=4) | st.tuples(inner, inner)
    | st.frozensets(text, max_size=3),
    max_leaves=12,
)  # fmt: skip
error = st.one_of(
    st.none(),
    text.map(ValueError),
    st.builds(lambda a, b: ExceptionGroup(f"g{a}", [ValueError(b), KeyError(a)]), text, text),
    text.map(KeyboardInterrupt),
)
extra = st.dictionaries(
    st.sampled_from(
        ["data", "trace_id", "span_id", "correlation_id", "tenant_id", "category", "event_type", "stack_info"]
    )
    | text,
    value,
    max_size=5,
)


@st.composite
def records(draw: st.DrawFn) -> logging.LogRecord:
    failure = draw(error)
    made = logging.LogRecord(
        draw(text),
        draw(st.sampled_from([10, 20, 25, 30, 40, 50]) | st.integers()),
        draw(text),
        1,
        draw(text | value),
        draw(st.just(()) | st.lists(value, max_size=3).map(tuple)),
        None if failure is None else raised(failure),
    )
    made.created = draw(st.floats() | st.floats(0, 4e9))
    for name, given_value in draw(extra).items():
        if name not in made.__dict__ or name == "stack_info":
            made.__dict__[name] = given_value
    return made


@settings(max_examples=400, deadline=None)
@given(record=records(), service=text.filter(bool), limit=st.sampled_from([1000, 1500, 16_000]))
def test_any_record_gives_one_valid_line_of_json(record: logging.LogRecord, service: str, limit: int) -> None:
    parsed(SomaStackJSONFormatter(service=service, limit=limit).format(record), limit)


@settings(max_examples=400, deadline=None)
@given(
    record=records(),
    service=text.filter(lambda name: bool(name) and "\t" not in name),
    emoji=st.booleans(),
    encoding=st.sampled_from(["utf-8", "ascii", "cp1252", "cp437", "utf-16"]),
    limits=st.sampled_from([(0, 0), (20, 30), (500, 16_000)]),
)
def test_any_record_gives_one_valid_line_on_the_console(
    record: logging.LogRecord, service: str, emoji: bool, encoding: str, limits: tuple[int, int]
) -> None:
    class Stream:
        pass

    stream: Any = Stream()
    stream.encoding = encoding
    formatter = SomaStackFormatter(
        service=service,
        colour=False,
        emoji=emoji and encoding.startswith("utf"),
        stream=stream,
        limit=limits[0],
        text_limit=limits[1],
    )
    check_console(formatter.format(record), encoding=encoding)


@settings(max_examples=300, deadline=None)
@given(
    record=records(),
    at=st.sampled_from(["{0}", "postgresql://app:{0}@db/shop", "password={0}", "Bearer {0}", "Cookie: a={0}"]),
    around=st.tuples(text, text),
    path=st.lists(st.sampled_from(["a", "b", 0]), max_size=4),
)
def test_no_secret_is_in_any_line(record: logging.LogRecord, at: str, around: tuple[str, str], path: list[Any]) -> None:
    bare = at == "{0}"
    secret: Any = CANARY if bare else f"{around[0]} {at.format(CANARY)} {around[1]}"
    hidden: Any = {"db_password": secret} if bare else secret
    for step in path:
        hidden = [hidden] if step == 0 else {step: hidden, "beside": around[0]}
    record.__dict__["hidden"] = hidden
    record.exc_text = None if bare else f"ValueError: {secret}"
    for formatter in (
        SomaStackJSONFormatter(service="shop"),
        SomaStackFormatter(service="shop", emoji=True, colour=True),
    ):
        assert CANARY not in formatter.format(record)


@given(record=records())
def test_the_message_is_the_one_that_was_said(record: logging.LogRecord) -> None:
    """What is not hostile, secret or long comes through as it is."""
    record.msg, record.args = "said", ()
    record.__dict__["data"] = {"n": 1, "nested": {"list": [True, None, 1.5, "x"]}}
    found = parsed(SomaStackJSONFormatter(service="shop").format(record))
    assert found["message"] == "said"
    if len(orjson.dumps(found)) < 8000:
        assert found["data"]["nested"] == {"list": [True, None, 1.5, "x"]}


@given(text=text, limit=st.integers(0, 60))
def test_a_cut_keeps_the_beginning_and_the_end(text: str, limit: int) -> None:
    kept = cut(text, limit)
    assert kept == text or (kept.endswith(TRUNCATED) and text.startswith(kept.removesuffix(TRUNCATED)))
    assert len(kept) <= max(limit + len(TRUNCATED), 0)
    middle = cut_middle(text, limit)
    assert middle == text or len(middle) <= limit + len(TRUNCATED) + 32


@given(text=text)
def test_plain_text_is_printable_and_says_the_same_twice(text: str) -> None:
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)
