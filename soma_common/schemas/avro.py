"""Payload models to Avro schemas: one record per event type and version, and the generic record for all others.

A schema describes the *JSON form* of a payload (what pydantic writes in JSON mode), because that is what every reader
of the library gets, whichever codec carried it. So the model's JSON schema in serialization mode is the source: it
already follows serializers, aliases, discriminators and defaults.

====================================  =============================================================================
Python                                Avro
====================================  =============================================================================
str, Literal, URL, timedelta          string
Enum of strings                       enum when every value is an Avro name, otherwise string
int, Enum of ints                     long (an event with a larger number is written by the generic record)
float / bool                          double / boolean
UUID                                  string, logicalType uuid: readable everywhere, and as JSON has it
Decimal                               string: Avro's decimal fixes one scale, and ``1.10`` must not become ``1.1``
bytes                                 bytes (``somaForm`` tells how JSON shows them)
datetime, AwareDatetime               long, timestamp-micros
NaiveDatetime                         long, local-timestamp-micros
date / time                           int, date / long, time-micros
list, set, tuple[X, ...]              array
dict[str, X]                          map
X | None                              union with null
union of models                       union of records that differ in a Literal field
Any, JsonValue, dict[str, Any], dict  string that holds JSON (``somaForm`` json)
====================================  =============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pydantic_core
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, NoDefault

from soma_common.errors import ConfigurationError
from soma_common.events.payloads import Payload
from soma_common.schemas.defaults import avro_default, default_first
from soma_common.schemas.forms import full_name
from soma_common.schemas.unions import merge_branches

Schema = dict[str, Any]

NAMESPACE: Final = "com.soma.events"
GENERIC_NAME: Final = f"{NAMESPACE}.SomaEvent"
# The generic record stands for no event type; this key names it beside the (event type, version) of the others.
GENERIC: Final = ("", 0)

_AVRO_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*\Z")
_FORMATS: Final[dict[str, Any]] = {
    "uuid": {"type": "string", "logicalType": "uuid"},
    "date-time": {"type": "long", "logicalType": "timestamp-micros"},
    "x-naive": {"type": "long", "logicalType": "local-timestamp-micros"},
    "date": {"type": "int", "logicalType": "date"},
    "time": {"type": "long", "logicalType": "time-micros"},
    "binary": {"type": "bytes", "somaForm": "utf8"},
    "base64url": {"type": "bytes", "somaForm": "base64"},
}
_PLAIN: Final = {"integer": "long", "number": "double", "boolean": "boolean", "string": "string", "null": "null"}
_JSON_TEXT: Final[Schema] = {"type": "string", "somaForm": "json"}
_CONSTANT_FACTORIES = (list, dict, set, frozenset, tuple)


def generic_schema() -> Schema:
    """The record for event types without a model: the payload is JSON in a string."""
    doc = "An event whose type has no schema of its own; its payload is JSON text."
    return _event_record("SomaEvent", NAMESPACE, doc, "string")


def event_schema(model: type[Payload]) -> Schema:
    """The record of one registered event type: the envelope's fields and the typed payload.

    Raises:
        ConfigurationError: a field has a type that Avro cannot hold; names the model, the field and the cure.
    """
    namespace = namespace_of(model.event_type, model.schema_version)
    payload = _Translation(model, namespace).payload()
    record = _event_record("Event", namespace, f"{model.event_type}, version {model.schema_version}.", payload)
    return _once(record, set())  # type: ignore[no-any-return]


def event_schemas(models: Iterable[type[Payload]]) -> dict[tuple[str, int], Schema]:
    """The schemas of these models by (event type, version), with the generic one under ``GENERIC``."""
    schemas = {(model.event_type, model.schema_version): event_schema(model) for model in models}
    return {GENERIC: generic_schema(), **schemas}


def namespace_of(event_type: str, version: int) -> str:
    """The Avro namespace of an event type's records, injectively.

    Event types are lower case, so capitals are free to stand for what Avro forbids: ``-`` becomes ``H``, and a word
    that begins with a digit gets ``N`` before it.
    """
    words = event_type.replace("-", "H").split(".")
    return ".".join([NAMESPACE, *(f"N{word}" if word[0].isdigit() else word for word in words), f"v{version}"])


def artifact_id(event_type: str, version: int) -> str:
    """The name under which the registry keeps a schema, and the stem of its file.

    Each version is an artifact of its own: a new version exists because the change is *not* BACKWARD (upcasters
    bridge it), while additions with a default become versions of the same artifact, guarded by the BACKWARD rule.
    """
    return GENERIC_NAME if (event_type, version) == GENERIC else f"{event_type}.v{version}"


def _event_record(name: str, namespace: str, doc: str, payload: Any) -> Schema:
    """Envelope and payload. Empty text stands for "none": a nullable union doubles what a field costs."""
    micros = {"type": "long", "logicalType": "timestamp-micros"}
    texts = ("tenant_id", "aggregate_type", "aggregate_id", "service_id", "correlation_id")
    fields: list[Schema] = [
        {"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "event_type", "type": "string"},
        {"name": "schema_version", "type": "int"},
        *({"name": text, "type": "string"} for text in texts),
        {"name": "causation_id", "type": "string", "default": "", "doc": "Empty when there is none."},
        {"name": "idempotency_key", "type": "string"},
        {"name": "traceparent", "type": "string", "doc": "W3C trace context, version 00."},
        {"name": "tracestate", "type": "string", "default": "", "doc": "Empty when there is none."},
        {"name": "baggage", "type": "string", "default": "", "doc": "Empty when there is none."},
        {"name": "timestamp", "type": micros, "doc": "Rises strictly within a stream."},
        {"name": "occurred_at", "type": micros, "doc": "The producer's own clock."},
        {"name": "metadata", "type": "string", "default": "", "doc": "A JSON object; empty when there is none."},
        {"name": "payload", "type": payload},
    ]
    return {"type": "record", "name": name, "namespace": namespace, "doc": doc, "fields": fields}


class _JsonForm(GenerateJsonSchema):
    """pydantic's JSON schema, plus what Avro needs to know: naive times, constant factories, what has no JSON."""

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().datetime_schema(schema)
        if found.get("format") == "date-time" and schema.get("tz_constraint") == "naive":
            return {**found, "format": "x-naive"}
        return found

    def get_default_value(self, schema: Any) -> Any:
        if schema.get("default_factory") in _CONSTANT_FACTORIES:
            return schema["default_factory"]()
        return schema.get("default", NoDefault)

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {"x-unsupported": error_info}


class _Translation:
    """One model on its way to Avro: where we are, and which named types are already written."""

    def __init__(self, model: type[Payload], namespace: str) -> None:
        self._model, self._namespace = model, namespace
        try:
            # Names as the payload's JSON has them: pydantic writes aliases only where the model says so.
            aliases = bool(model.model_config.get("serialize_by_alias"))
            self._json = model.model_json_schema(by_alias=aliases, mode="serialization", schema_generator=_JsonForm)
        except PydanticUserError as error:
            raise ConfigurationError(f"{model.__name__} has no JSON form: {error.message}.") from error
        self._defs: Mapping[str, Any] = self._json.get("$defs", {})
        self._named_types: dict[str, Any] = {}
        self._owners: dict[str, str] = {}
        self._open: list[str] = []

    def payload(self) -> Schema:
        """The record named Payload."""
        if "$ref" in self._json:
            raise self._unsupported("", "it contains itself", "keep trees as JSON: annotate the field JsonValue")
        return self._record("Payload", self._json, "")

    def _record(self, name: str, shape: Mapping[str, Any], path: str) -> Schema:
        if shape.get("additionalProperties"):
            raise self._unsupported(path, 'it allows unknown fields (extra="allow")', "name the fields, or use a dict")
        self._check_name(name, path)
        self._open.append(name)
        fields = [self._field(key, inner, _join(path, key)) for key, inner in shape.get("properties", {}).items()]
        self._open.pop()
        return {"type": "record", "name": name, "namespace": self._namespace, **_doc(shape), "fields": fields}

    def _check_name(self, name: str, path: str) -> None:
        if name == "Event" or (path and name == "Payload"):
            raise self._unsupported(path, f"its type is called {name}, as the record around it", "rename that class")

    def _field(self, name: str, shape: Mapping[str, Any], path: str) -> Schema:
        if not _AVRO_NAME.match(name):
            cure = "use letters, digits and underscores in names and aliases"
            raise self._unsupported(path, f"{name!r} is not an Avro name", cure)
        kind = self._type(shape, path)
        if "default" not in shape:
            return {"name": name, "type": kind, **_doc(shape)}
        try:
            kind = default_first(kind, shape["default"])
            return {"name": name, "type": kind, "default": avro_default(kind, shape["default"]), **_doc(shape)}
        except ValueError as error:
            raise self._unsupported(path, f"its default {error}", "leave the default out, or choose another") from error

    def _type(self, shape: Mapping[str, Any] | bool, path: str) -> Any:
        if isinstance(shape, bool) or not (shape.keys() - {"title", "description", "default", "examples"}):
            return dict(_JSON_TEXT)
        if "x-unsupported" in shape:
            raise self._unsupported(path, f"it is {shape['x-unsupported']}", "use a type that JSON has")
        if "$ref" in shape:
            return self._named(shape["$ref"].rsplit("/", 1)[-1], path)
        branches = shape.get("anyOf") or shape.get("oneOf")
        if branches:
            return self._union(branches, path)
        if "const" in shape or "enum" in shape:
            return self._literal(shape.get("enum", [shape.get("const")]), path)
        return self._shaped(shape, path)

    def _shaped(self, shape: Mapping[str, Any], path: str) -> Any:
        kind = shape.get("type")
        if kind == "array":
            return {"type": "array", "items": self._items(shape, path)}
        if kind == "object":
            return self._object(shape, path)
        if kind == "string" and shape.get("format") in _FORMATS:
            return dict(_FORMATS[shape["format"]])
        if isinstance(kind, str) and kind in _PLAIN:
            return _PLAIN[kind]
        raise self._unsupported(path, f"its JSON schema says {str(dict(shape))[:120]}", "use a plainer type")

    def _object(self, shape: Mapping[str, Any], path: str) -> Any:
        values = shape.get("additionalProperties") or next(iter(shape.get("patternProperties", {}).values()), None)
        if values is None or values is True or values == {}:
            return dict(_JSON_TEXT)
        return {"type": "map", "values": self._type(values, f"{path}{{}}")}

    def _items(self, shape: Mapping[str, Any], path: str) -> Any:
        where = f"{path}[]"
        kinds = [self._type(each, where) for each in shape.get("prefixItems", [shape.get("items", {})])]
        if any(kind != kinds[0] for kind in kinds) or ("prefixItems" in shape and "items" in shape):
            raise self._unsupported(path, "it is a tuple of different types", "make it a model with named fields")
        if _is_empty(kinds[0]):
            # Such items take no bytes, so a hostile count could make a reader build a list without end.
            raise self._unsupported(where, "its items have no content", "give the items a field")
        return kinds[0]

    def _named(self, key: str, path: str) -> Any:
        """A type with a name, written out each time; ``_once`` turns repetitions into references."""
        name = re.sub(r"[^A-Za-z0-9_]", "_", key)
        if self._owners.setdefault(name, key) != key:
            raise self._unsupported(path, f"two of its types are called {name}", "rename one of the classes")
        if name in self._open:
            # fastavro recurses in C without a limit: a hostile record of a recursive type ends the process.
            raise self._unsupported(path, f"{key} contains itself", "keep trees as JSON: annotate the field JsonValue")
        if name not in self._named_types:
            self._named_types[name] = self._definition(name, self._defs[key], path)
        return self._named_types[name]

    def _definition(self, name: str, shape: Mapping[str, Any], path: str) -> Any:
        if "properties" in shape or (shape.get("type") == "object" and "additionalProperties" not in shape):
            return self._record(name, shape, path)
        values = shape.get("enum", [shape["const"]] if "const" in shape else [])
        if values and all(isinstance(value, str) and _AVRO_NAME.match(value) for value in values):
            self._check_name(name, path)
            return {"type": "enum", "name": name, "namespace": self._namespace, **_doc(shape), "symbols": values}
        return self._type(shape, path)

    def _literal(self, values: list[Any], path: str) -> Any:
        kinds = {type(value) for value in values}
        if kinds == {str}:
            return {"type": "string", "somaLiteral": values}
        if kinds == {type(None)}:
            return "null"
        if len(kinds) == 1 and kinds <= {int, float, bool}:
            return {int: "long", float: "double", bool: "boolean"}[kinds.pop()]
        return self._join([self._literal([v for v in values if type(v) is kind], path) for kind in kinds], path)

    def _union(self, branches: list[Any], path: str) -> Any:
        return self._join([self._type(branch, path) for branch in branches], path)

    def _join(self, kinds: list[Any], path: str) -> Any:
        try:
            return merge_branches(kinds)
        except ValueError as error:
            cure = 'give each model a field such as `kind: Literal["..."]` of its own'
            raise self._unsupported(path, str(error), cure) from error

    def _unsupported(self, path: str, why: str, cure: str) -> ConfigurationError:
        where = f"{self._model.__name__}.{path}" if path else self._model.__name__
        return ConfigurationError(f"{where} cannot become Avro: {why}.", cure=f"{cure}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _doc(shape: Mapping[str, Any]) -> Schema:
    return {"doc": shape["description"]} if shape.get("description") else {}


def _is_empty(kind: Any) -> bool:
    if isinstance(kind, dict) and kind["type"] == "record":
        return all(_is_empty(field["type"]) for field in kind["fields"])
    return bool(kind == "null")


def _once(schema: Any, seen: set[str]) -> Any:
    """The schema with each named type written out where it first stands, and named from then on."""
    if isinstance(schema, list):
        return [_once(branch, seen) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    if "name" in schema:
        name = full_name(schema)
        if name in seen:
            return name
        seen.add(name)
    if schema["type"] == "record":
        return {**schema, "fields": [{**field, "type": _once(field["type"], seen)} for field in schema["fields"]]}
    return {key: _once(inner, seen) if key in {"items", "values"} else inner for key, inner in schema.items()}


def schema_text(schema: Any, *, pretty: bool = False) -> str:
    """A schema as JSON text: compact for the registry, indented for files. Equal schemas give equal texts."""
    return pydantic_core.to_json(schema, indent=2 if pretty else None).decode() + ("\n" if pretty else "")
