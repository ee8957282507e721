"""Which field breaks compatibility; snapshots; addresses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import ConfigurationError, SchemaNotFound
from soma_common.schemas.address import RegistryAuth, check_id, check_url
from soma_common.schemas.compat import breaks, field_at
from soma_common.schemas.table import SchemaRef, SchemaTable


def _record(*fields: Any, name: str = "R") -> dict[str, Any]:
    return {"type": "record", "name": name, "namespace": "n", "fields": list(fields)}


def _field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


ENUM = {"type": "enum", "name": "E", "symbols": ["A", "B"]}


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (_record(_field("a", "long")), _record(_field("a", "int")), []),
        (_record(_field("a", "int")), _record(_field("a", "long")), ["a: int cannot read long"]),
        (_record(_field("a", "int", default=1)), _record(), []),
        (_record(_field("a", "int")), _record(), ["a: new, and without a default"]),
        (_record(), _record(_field("a", "int")), []),
        (_record(_field("a", ["null", "int"])), _record(_field("a", "int")), []),
        (_record(_field("a", "int")), _record(_field("a", ["null", "int"])), ["a: int cannot read null"]),
        (
            _record(_field("a", ["null", "int"])),
            _record(_field("a", "string")),
            ["a: no branch of its union reads string"],
        ),
        (_record(_field("a", {**ENUM, "symbols": ["A"]})), _record(_field("a", ENUM)), ["a: B no longer allowed"]),
        (_record(_field("a", {**ENUM, "symbols": ["A"], "default": "A"})), _record(_field("a", ENUM)), []),
        (
            _record(_field("p", _record(_field("l", {"type": "array", "items": "string"}), name="P"))),
            _record(_field("p", _record(_field("l", {"type": "array", "items": "long"}), name="P"))),
            ["p.l[]: string cannot read long"],
        ),
        (
            _record(_field("m", {"type": "map", "values": "int"})),
            _record(_field("m", {"type": "map", "values": {"type": "long", "logicalType": "timestamp-micros"}})),
            ["m{}: int cannot read long (timestamp-micros)"],
        ),
        (
            _record(_field("p", _record(name="Q"))),
            _record(_field("p", _record(name="P"))),
            ["p: the record is now called Q, and was P"],
        ),
        (
            _record(_field("p", _record(_field("x", "int"), name="P")), _field("q", "n.P")),
            _record(_field("p", _record(_field("x", "string"), name="P")), _field("q", "n.P")),
            ["p.x: int cannot read string", "q.x: int cannot read string"],
        ),
        ("int", _record(), ["the record: int cannot read record R"]),
    ],
)
def test_each_break_names_its_field(new: Any, old: Any, expected: list[str]) -> None:
    assert breaks(new, old) == expected


@pytest.mark.parametrize(
    ("pointer", "path"),
    [
        ("/fields/0/type/fields/1", "p.y"),
        ("/fields/0/type/fields/1/type", "p.y"),
        ("/fields/1/type/symbols", "e"),
        ("/", ""),
        ("/fields/9", ""),
        ("/nonsense/x", ""),
    ],
)
def test_a_pointer_into_a_schema_becomes_a_field_path(pointer: str, path: str) -> None:
    schema = _record(_field("p", _record(_field("x", "int"), _field("y", "long"), name="P")), _field("e", ENUM))
    assert field_at(schema, pointer) == path


def _table() -> SchemaTable:
    table = SchemaTable()
    table.learn(SchemaRef("content", 3), '"string"')
    table.learn(SchemaRef("global", 4), '"int"')
    return table


def test_a_snapshot_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "schemas.json"
    _table().save(path, "here")
    fresh = SchemaTable()
    assert fresh.load(path, "here")
    assert fresh.schema_of(SchemaRef("content", 3)) == "string"
    assert fresh.schema_of(SchemaRef("global", 4)) == "int"
    assert (fresh.content_id('"string"'), fresh.content_id('"int"')) == (3, None)
    assert [file.name for file in path.parent.iterdir()] == ["schemas.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"format": 1}', b"[" * 100_000,
        json.dumps({"format": 2, "source": "here", "ids": {}, "schemas": []}).encode(),
        json.dumps({"format": 1, "source": "there", "ids": {}, "schemas": []}).encode(),
        json.dumps({"format": 1, "source": "here", "ids": [], "schemas": []}).encode(),
        json.dumps({"format": 1, "source": "here", "ids": {}, "schemas": [["odd", 1, {}]]}).encode(),
        json.dumps({"format": 1, "source": "here", "ids": {}, "schemas": [["content", "x", {}]]}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_snapshot_is_ignored_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "schemas.json"
    path.write_bytes(content)
    table = SchemaTable()
    with caplog.at_level(logging.WARNING):
        assert not table.load(path, "here")
    assert len(caplog.records) == 1
    assert table.schema_of(SchemaRef("content", 3)) is None


def test_a_missing_snapshot_is_nothing_to_warn_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not SchemaTable().load(tmp_path / "none.json", "here")
    assert caplog.records == []


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "schemas.json"
    path.write_text("old")
    table = _table()
    table._schemas[SchemaRef("content", 9)] = object()
    with pytest.raises(TypeError):
        table.save(path, "here")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_table_asked_for_more_than_it_has() -> None:
    with pytest.raises(SchemaNotFound, match="contentId 99"):
        await _table().fetch(SchemaRef("content", 99))
    assert await _table().fetch(SchemaRef("content", 3)) == "string"


@pytest.mark.parametrize("url", ["http://r:8085", "http://r:8085/", "http://r:8085/apis/registry/v3/"])
def test_urls_are_brought_to_their_base(url: str) -> None:
    assert check_url(url) == "http://r:8085"


@pytest.mark.parametrize(
    "url",
    [
        "", "r:8085", "ftp://r", "file:///etc/passwd", "http://", "http://u:p@r", "http://r/?a=b", "http://r/#x",
        "http://r\n/x", "http://r /x", "http://r:99999", "http://r:0", "http://[::1", "http://r\\@evil", "javascript:1",
    ],
)  # fmt: skip
def test_hostile_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        check_url(url)


@pytest.mark.parametrize("group", ["", ".", "..", "a/b", "a%2fb", "a b", "ä", "x" * 600, "-x", "a\n"])
def test_hostile_ids_are_refused(group: str) -> None:
    with pytest.raises(ConfigurationError):
        check_id("group", group)


def test_credentials_are_whole_and_never_shown() -> None:
    assert "secret" not in repr(RegistryAuth(token="secret")) + repr(RegistryAuth(username="u", password="secret"))
    wrong: list[dict[str, str]] = [
        {},
        {"username": "u"},
        {"token": "t", "username": "u", "password": "p"},
        {"token": "a\nb"},
    ]
    for case in wrong:
        with pytest.raises(ConfigurationError):
            RegistryAuth(**case)
