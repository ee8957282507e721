"""Between the JSON form of a value and what fastavro reads and writes, compiled once per schema.

``to_datum`` and ``from_datum`` return a function, or None where both forms are the same: text, numbers and records of
them cost nothing. fastavro itself converts the standard logical types, so records of foreign producers (decimal,
fixed uuid, millis) come out in the same JSON form.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

Convert = Callable[[Any], Any]
Names = Mapping[str, Any]


class Inexact(ValueError):
    """This value would not come back from Avro as it is."""


def kind_of(schema: Any) -> str:
    """The Avro type's name: of a union ``union``, of a reference the name itself."""
    if isinstance(schema, list):
        return "union"
    kind = schema["type"] if isinstance(schema, dict) else schema
    return kind_of(kind) if isinstance(kind, dict | list) else str(kind)


def logical_of(schema: Any) -> str | None:
    """The logical type, or None."""
    found = schema.get("logicalType") if isinstance(schema, dict) else None
    return found if isinstance(found, str) else None


def full_name(schema: Mapping[str, Any]) -> str:
    """The full name of a record, enum or fixed whose namespace is written out."""
    name = str(schema["name"])
    namespace = schema.get("namespace")
    return name if "." in name or not namespace else f"{namespace}.{name}"


def to_datum(schema: Any, names: Names) -> Convert | None:
    """JSON form to datum. The function raises Inexact (or KeyError, TypeError, ValueError) for what does not fit."""
    schema = names.get(schema, schema) if isinstance(schema, str) else schema
    kind, logical = kind_of(schema), logical_of(schema)
    if kind == "record":
        return _record([(f["name"], to_datum(f["type"], names)) for f in schema["fields"]])
    if kind == "array":
        return _array(to_datum(schema["items"], names))
    if kind == "map":
        return _map(to_datum(schema["values"], names))
    if kind == "union":
        return _union_to(schema, names)
    if kind in {"int", "long"} and logical is not None:
        return _LOGICAL_TO.get(logical)
    if kind == "bytes" or _form(schema) is not None:
        return {"json": _json_text, "base64": _base64_bytes}.get(_form(schema) or "utf8", str.encode)
    return None


def from_datum(schema: Any, names: Names) -> Convert | None:
    """Datum, as fastavro gives it, to JSON form."""
    schema = names.get(schema, schema) if isinstance(schema, str) else schema
    kind, logical = kind_of(schema), logical_of(schema)
    if kind == "record":
        return _record([(f["name"], from_datum(f["type"], names)) for f in schema["fields"]])
    if kind == "array":
        return _array(from_datum(schema["items"], names))
    if kind == "map":
        return _map(from_datum(schema["values"], names))
    if kind == "union":
        return _union_from(schema, names)
    if logical == "decimal" or (logical is not None and kind in {"int", "long"}):
        return _shown
    if kind == "fixed" and logical == "uuid":
        return _uuid_text
    if kind in {"bytes", "fixed"} or _form(schema) is not None:
        return {"json": orjson.loads, "base64": _base64_text}.get(_form(schema) or "utf8", _utf8)
    return None


def literal_field(records: list[Mapping[str, Any]]) -> tuple[str, dict[str, str]] | None:
    """The field whose literals tell these records apart, with the record's full name for each literal."""
    for field in records[0]["fields"]:
        tags: dict[str, str] = {}
        sizes = 0
        for record in records:
            values = _literals(record, field["name"])
            sizes += len(values) or len(records) * 1_000
            tags |= dict.fromkeys(values, full_name(record))
        if len(tags) == sizes:
            return field["name"], tags
    return None


def _literals(record: Mapping[str, Any], name: str) -> list[str]:
    kinds = [field["type"] for field in record["fields"] if field["name"] == name]
    return list(kinds[0].get("somaLiteral", [])) if kinds and isinstance(kinds[0], dict) else []


def _record(fields: list[tuple[str, Convert | None]]) -> Convert | None:
    changed = [(name, convert) for name, convert in fields if convert is not None]

    def convert_record(value: Any) -> Any:
        for name, convert in changed:
            value[name] = convert(value[name])
        return value

    return convert_record if changed else None


def _array(items: Convert | None) -> Convert | None:
    return None if items is None else lambda values: [items(value) for value in values]


def _map(values: Convert | None) -> Convert | None:
    return None if values is None else lambda entries: {key: values(value) for key, value in entries.items()}


def _resolved(branches: list[Any], names: Names) -> list[Any]:
    return [names.get(branch, branch) if isinstance(branch, str) else branch for branch in branches]


_JSON_TYPES: dict[str, type] = {
    "null": type(None), "boolean": bool, "int": int, "long": int, "float": float, "double": float,
    "array": list, "map": dict, "record": dict,
}  # fmt: skip
_LOGICAL_TYPES: dict[str, type] = {
    "timestamp-micros": datetime, "timestamp-millis": datetime,
    "local-timestamp-micros": datetime, "local-timestamp-millis": datetime,
    "date": date, "time-micros": time, "time-millis": time, "decimal": Decimal,
}  # fmt: skip


def json_type(schema: Any) -> type:
    """The Python type of a branch's JSON form: what tells the branches of a union apart when writing."""
    if _form(schema) == "json":
        return object
    return str if logical_of(schema) else _JSON_TYPES.get(kind_of(schema), str)


def _datum_type(schema: Any) -> type:
    known = _LOGICAL_TYPES.get(logical_of(schema) or "")
    return known or (bytes if kind_of(schema) in {"bytes", "fixed"} else json_type(schema))


def _union_to(branches: list[Any], names: Names) -> Convert | None:
    resolved = _resolved(branches, names)
    records = [branch for branch in resolved if kind_of(branch) == "record"]
    by_type = {json_type(branch): to_datum(branch, names) for branch in resolved if kind_of(branch) != "record"}
    if len(records) == 1:
        by_type[dict] = to_datum(records[0], names)
    elif records:
        by_type[dict] = _tagged(records, names)
    return _dispatch(by_type) if any(by_type.values()) else None


def _tagged(records: list[Mapping[str, Any]], names: Names) -> Convert:
    found = literal_field(records)
    if found is None:
        return _cannot_tell  # a foreign schema: it can be read, and nobody writes with it here
    field, tags = found
    converts = {full_name(record): to_datum(record, names) for record in records}

    def convert_tagged(value: Any) -> Any:
        name = tags[value[field]]
        convert = converts[name]
        return name, convert(value) if convert is not None else value

    return convert_tagged


def _cannot_tell(value: Any) -> Any:
    raise Inexact("the records of this union cannot be told apart")


def _union_from(branches: list[Any], names: Names) -> Convert | None:
    resolved = _resolved(branches, names)
    records = [branch for branch in resolved if kind_of(branch) == "record"]
    by_type = {_datum_type(branch): from_datum(branch, names) for branch in resolved}
    if len(records) > 1:
        converts = {full_name(record): from_datum(record, names) for record in records}
        by_type[tuple] = lambda named: convert(named[1]) if (convert := converts[named[0]]) else named[1]
    return _dispatch(by_type) if any(by_type.values()) else None


def _dispatch(by_type: dict[type, Convert | None]) -> Convert:
    other = by_type.get(object)

    def convert_branch(value: Any) -> Any:
        convert = by_type.get(type(value), other)
        return value if convert is None else convert(value)

    return convert_branch


def _form(schema: Any) -> str | None:
    return schema.get("somaForm") if isinstance(schema, dict) else None


def _exact(text: str, parse: Callable[[str], Any], zoned: bool) -> Any:
    """The time in a text, only when the text is the one that would be made of it again: Avro keeps UTC or no zone."""
    moment = parse(text)
    if zoned != text.endswith("Z") or (not zoned and getattr(moment, "tzinfo", None) is not None):
        raise Inexact("the zone differs from the schema's")
    if _shown(moment) != text:
        raise Inexact("the text is not in its usual form")
    return moment


def _shown(value: Any) -> Any:
    """A time or Decimal as pydantic writes it in JSON; other values as they are."""
    if isinstance(value, datetime | time | date):
        return value.isoformat().replace("+00:00", "Z")
    return str(value) if isinstance(value, Decimal) else value


_LOGICAL_TO: dict[str, Convert] = {
    "timestamp-micros": lambda text: _exact(text, datetime.fromisoformat, True),
    "timestamp-millis": lambda text: _exact(text, datetime.fromisoformat, True),
    "local-timestamp-micros": lambda text: _exact(text, datetime.fromisoformat, False),
    "date": lambda text: _exact(text, date.fromisoformat, False),
    "time-micros": lambda text: _exact(text, time.fromisoformat, False),
}


def _json_text(value: Any) -> str:
    return orjson.dumps(value).decode()


def _uuid_text(value: bytes) -> str:
    return str(UUID(bytes=value))


def _utf8(value: bytes) -> str:
    return value.decode("utf-8")


def _base64_bytes(text: str) -> bytes:
    value = base64.urlsafe_b64decode(text)
    if _base64_text(value) != text:
        raise Inexact("the text is not canonical base64")
    return value


def _base64_text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode()
