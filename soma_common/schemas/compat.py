"""Which fields keep a new schema from reading what an old one wrote, by Avro's rules of schema resolution.

The registry decides; this tells a person *where*: its answers point into the schema (``/fields/16/type/fields/2``),
and some say nothing at all. Rules: https://avro.apache.org/docs/1.12.0/specification/#schema-resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from soma_common.schemas.forms import full_name, kind_of

_PROMOTIONS = {
    "int": {"long", "float", "double"},
    "long": {"float", "double"},
    "float": {"double"},
    "string": {"bytes"},
    "bytes": {"string"},
}


def breaks(reader: Any, writer: Any) -> list[str]:
    """One line for each place where ``reader`` cannot read what ``writer`` wrote: ``payload.total: ...``."""
    names = (named_types(reader), named_types(writer))
    return list(dict.fromkeys(_breaks(reader, writer, names, "")))


def named_types(schema: Any) -> dict[str, Any]:
    """Every record, enum and fixed inside a schema, by full name."""
    return dict(_named(schema, ""))


def field_at(schema: Any, pointer: str) -> str:
    """The dotted field path that a JSON pointer into a schema stands for; empty when it names none."""
    path: list[str] = []
    place = schema
    for step in pointer.strip("/").split("/"):
        try:
            place = place[int(step)] if isinstance(place, list) else place[step]
        except (KeyError, IndexError, ValueError, TypeError):
            break
        if isinstance(place, dict) and "name" in place and "type" in place and place["type"] not in _DEFINITIONS:
            path.append(str(place["name"]))
    return ".".join(path)


_DEFINITIONS = ("record", "enum", "fixed")


def _named(schema: Any, namespace: str) -> Iterator[tuple[str, Any]]:
    if isinstance(schema, list):
        for branch in schema:
            yield from _named(branch, namespace)
        return
    if not isinstance(schema, dict):
        return
    space = schema.get("namespace", namespace)
    if schema["type"] in _DEFINITIONS:
        yield full_name({**schema, "namespace": space}), schema
    inner = [field["type"] for field in schema.get("fields", [])]
    for each in [*inner, schema.get("items"), schema.get("values"), schema["type"]]:
        if isinstance(each, dict | list):
            yield from _named(each, space)


Names = tuple[Mapping[str, Any], Mapping[str, Any]]


def _breaks(reader: Any, writer: Any, names: Names, path: str) -> Iterator[str]:
    reader = names[0].get(reader, reader) if isinstance(reader, str) else reader
    writer = names[1].get(writer, writer) if isinstance(writer, str) else writer
    if isinstance(writer, list):
        for branch in writer:
            yield from _breaks(reader, branch, names, path)
    elif isinstance(reader, list):
        if not any(not list(_breaks(branch, writer, names, path)) for branch in reader):
            yield f"{path or 'the record'}: no branch of its union reads {_shown(writer)}"
    else:
        yield from _one(reader, writer, names, path)


def _one(reader: Any, writer: Any, names: Names, path: str) -> Iterator[str]:
    new, old = kind_of(reader), kind_of(writer)
    if new == old == "record":
        yield from _records(reader, writer, names, path)
    elif new == old == "array":
        yield from _breaks(reader["items"], writer["items"], names, f"{path}[]")
    elif new == old == "map":
        yield from _breaks(reader["values"], writer["values"], names, f"{path}{{}}")
    elif new == old == "enum":
        yield from _enums(reader, writer, path)
    elif new != old and new not in _PROMOTIONS.get(old, ()):
        yield f"{path or 'the record'}: {_shown(reader)} cannot read {_shown(writer)}"


def _records(reader: Any, writer: Any, names: Names, path: str) -> Iterator[str]:
    if reader["name"].rsplit(".", 1)[-1] != writer["name"].rsplit(".", 1)[-1]:
        yield f"{path or 'the record'}: the record is now called {reader['name']}, and was {writer['name']}"
        return
    known = {field["name"]: field for field in writer["fields"]}
    for field in reader["fields"]:
        where = f"{path}.{field['name']}" if path else field["name"]
        if field["name"] in known:
            yield from _breaks(field["type"], known[field["name"]]["type"], names, where)
        elif "default" not in field:
            yield f"{where}: new, and without a default"


def _enums(reader: Any, writer: Any, path: str) -> Iterator[str]:
    gone = [symbol for symbol in writer["symbols"] if symbol not in reader["symbols"]]
    if gone and "default" not in reader:
        yield f"{path}: {', '.join(gone)} no longer allowed"


def _shown(schema: Any) -> str:
    if isinstance(schema, dict) and "name" in schema:
        return f"{kind_of(schema)} {schema['name']}"
    logical = schema.get("logicalType") if isinstance(schema, dict) else None
    return f"{kind_of(schema)} ({logical})" if logical else kind_of(schema)
