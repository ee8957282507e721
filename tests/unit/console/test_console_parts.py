"""Parts of the console without a server: settings, people, pictures, trees, values."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_common.console.drawing import picture
from soma_common.console.people import Gate, Role, Signer
from soma_common.console.rendering import about, coloured, dumped, query, short
from soma_common.console.security import host_of, local_path
from soma_common.console.settings import ConsoleSettings
from soma_common.console.traces import Node, tree, walk, waterfall
from soma_common.console.values import Shown, as_json, compared, indented
from soma_common.errors import ConfigurationError
from soma_common.sagas.graph import Box, boxes_of
from tests.console_shop import PLACE_ORDER

NOW = datetime(2026, 11, 30, tzinfo=UTC)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=20,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "0.0.0.0"}, {"host": "::"}, {"host": "example.org"}, {"token": "short"}, {"token": "ü" * 30}, {"tenants": ()},
        {"token": "t" * 20, "viewer_token": "t" * 20}, {"proxies": ("x",)}, {"proxies": ("10.0.0.1",), "user_header": ""},
        {"certificate": "c"}, {"port": -1}, {"query_timeout": 0.0}, {"live": 0}, {"session_hours": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ConsoleSettings(**wrong)


def test_settings_tell_nobody_their_tokens() -> None:
    assert "secret" not in repr(ConsoleSettings(token="secret-" * 4, viewer_token="secret!" * 4))


def test_off_loopback_with_a_token_or_a_proxy() -> None:
    assert ConsoleSettings(host="0.0.0.0", token="t" * 20).names is None
    assert ConsoleSettings(host="::", proxies=("10.0.0.0/8",)).asks_who
    assert ConsoleSettings(host="0.0.0.0", token="t" * 20, hosts=("Console.Example",)).names == ("console.example",)
    for local in ("127.0.0.1", "::1", "localhost", "127.0.0.5"):
        assert ConsoleSettings(host=local).is_local


def test_what_is_signed_for_one_purpose_is_good_for_no_other() -> None:
    signer = Signer()
    assert signer.read("visit", signer.sign("visit", "x")) == "x"
    for wrong in (signer.sign("session", "x"), Signer().sign("visit", "x"), "", None, "a.b", "é"):
        assert signer.read("visit", wrong) is None


def test_addresses_that_are_no_proxies() -> None:
    gate = Gate(ConsoleSettings(proxies=("10.0.0.0/8", "::1"), operators=("*",)), Signer())
    assert [gate.is_proxy(peer) for peer in ("10.9.9.9", "::1", "11.0.0.1", None, "", "unix", "::ffff:11.0.0.1")] == [
        True,
        True,
    ] + [False] * 5
    person = gate.person("10.0.0.1", {"x-forwarded-user": "ann"}, None)
    assert person is not None
    assert person.role is Role.OPERATOR


@pytest.mark.parametrize(
    ("header", "name"), [("a:80", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("A", "a"), ("a:b", "a:b")]
)
def test_names_in_host_headers(header: str, name: str) -> None:
    assert host_of(header) == name


@given(st.text(max_size=40))
def test_a_way_back_never_leads_away(text: str) -> None:
    assert re.match(r"/(?![/\\])|/$", local_path(text))
    assert re.match(r"/(?![/\\])|/$", local_path("/" + text))


@given(JSON)
def test_indented_json_says_the_same(value: Any) -> None:
    text = json.dumps({"v": value}, ensure_ascii=False)
    assert json.loads(indented(text)) == {"v": value}
    shown = as_json(text.encode("utf-8", "surrogatepass"))
    assert shown is None or all(c.isprintable() or c == "\n" for c in shown)


@given(st.binary(max_size=200))
def test_any_bytes_can_be_shown(value: bytes) -> None:
    shown = Shown.of(value)
    assert shown.size == len(value)
    assert all(c.isprintable() or c in "\n\t" for c in shown.text)


@given(st.text(max_size=80))
def test_colours_hide_no_markup(text: str) -> None:
    html = str(coloured({"k": text}))
    assert "<" not in re.sub(r'</?span( class="[a-z-]+")?>', "", html)


def test_values_in_part() -> None:
    assert "more characters" in coloured("x" * 100_000)
    assert dumped(bytes(5000))[1] == 904
    assert (short("a\n b" * 40, 10), about(5, 10), about(10, 10)) == ("a ba ba b…", "5", "9+")
    assert query("/a", b=None, c="", d=["x", "y"], e=NOW) == "/a?d=x&d=y&e=2026-11-30T00%3A00%3A00%2B00%3A00"


def test_comparing() -> None:
    lines = compared("a\nb\nc", "a\nB\nc")
    assert lines is not None
    assert [(line.kind, line.text) for line in lines if line.kind in ("new", "gone")] == [("gone", "b"), ("new", "B")]
    assert compared("x" * 300_000, "y") is None
    assert compared("same", "same") == []


def node(name: str, parent: str | None, second: float, length: float = 0) -> Node:
    began = NOW + timedelta(seconds=second)
    return Node("event", name, began, began + timedelta(seconds=length), "/", parent=parent, names=(name,))


def test_a_tree_of_causes() -> None:
    nodes = [node("c", "b", 3), node("a", None, 0), node("b", "a", 1), node("d", "a", 2), node("x", "gone", 4)]
    assert [(each.title, depth) for each, depth in walk(tree(nodes))] == [
        ("a", 0),
        ("b", 1),
        ("c", 2),
        ("d", 1),
        ("x", 0),
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_a_tree_holds_everything_once_whatever_the_causes(pairs: list[tuple[int, int]]) -> None:
    nodes = [node(str(name), str(parent), place) for place, (name, parent) in enumerate(pairs)]
    found = [id(each) for each, _ in walk(tree(nodes))]
    assert sorted(found) == sorted(map(id, nodes))


def test_a_waterfall_stays_within_its_width() -> None:
    bars = waterfall(tree([node("a", None, 0, 10), node("b", "a", 10, 0), node("c", "b", 5, 1)]))
    assert [(bar.left, bar.width) for bar in bars] == [(0, 1000), (500, 100), (997, 3)] or all(
        bar.left + bar.width <= 1000 for bar in bars
    )
    assert waterfall(tree([node("one", None, 0)]))[0].left == 0


def test_a_definition_is_drawn_without_overlap() -> None:
    drawn = picture("place-order v2", boxes_of(PLACE_ORDER), {"pay": "failed"})
    boxes = [each for each in drawn.shapes if each.kind != "frame"]
    assert [each.label for each in boxes if each.state == "failed"] == ["pay"]
    for one in boxes:
        assert one.x - one.width / 2 >= 0
        assert one.x + one.width / 2 <= drawn.width
        assert one.y - one.height / 2 >= 0
        assert one.y + one.height / 2 <= drawn.height
        for other in boxes:
            apart = (
                abs(one.x - other.x) >= (one.width + other.width) / 2
                or abs(one.y - other.y) >= (one.height + other.height) / 2
            )
            assert one is other or apart, (one, other)


def test_parts_inside_of_parts_are_drawn() -> None:
    step = Box("step", "a step with quite a long name of its own that is cut", "undo: that", step="s")
    inner = Box("when", "is it?", inner=((step, step), ()), step="w")
    drawn = picture("x", (Box("group", "for each", inner=((Box("parallel", inner=((inner,), (step,))),),)),))
    assert len([each for each in drawn.shapes if each.kind == "step"]) == 3
    assert max(each.x + each.width / 2 for each in drawn.shapes) <= drawn.width
