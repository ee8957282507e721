"""What a schema must be before bytes from outside are read with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from soma_common.errors import CodecError
from soma_common.schemas.compat import named_types
from soma_common.schemas.table import SchemaRef

MAX_DEPTH: Final = 60
MAX_STEPS: Final = 20_000
_REQUIRED: Final = frozenset({
    "event_id", "event_type", "schema_version", "tenant_id", "aggregate_type", "aggregate_id", "service_id",
    "correlation_id", "idempotency_key", "traceparent", "timestamp", "occurred_at", "payload",
})  # fmt: skip


def check_readable(ref: SchemaRef, schema: Any) -> None:
    """Refuse schemas that are no soma event's, and those that a hostile record could use against its reader.

    fastavro recurses in C without a limit, so a record of a recursive type can end the process; and items without
    content cost no bytes, so a count of 2**60 would build a list without end.

    Raises:
        CodecError: says what is wrong with the schema.
    """
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise CodecError(f"The schema with {ref} is not a record.")
    try:
        missing = _REQUIRED - {field["name"] for field in schema["fields"]}
        problem = next(_Walk(named_types(schema)).problems(schema), None)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CodecError(f"The schema with {ref} is malformed: {type(error).__name__}: {error}.") from error
    if missing:
        raise CodecError(f"The schema with {ref} is not of a soma event: it lacks {', '.join(sorted(missing))}.")
    if problem:
        raise CodecError(f"The schema with {ref} cannot be read safely: {problem}.")


class _Walk:
    """One way through a schema, with every reference followed: the way its compiled forms will take."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names, self._steps = names, 0

    def problems(self, schema: Any, inside: tuple[int, ...] = ()) -> Iterator[str]:
        """What makes it unsafe to read, if anything."""
        schema = self._step(schema)
        if isinstance(schema, list):
            for branch in schema:
                yield from self.problems(branch, inside)
            return
        if not isinstance(schema, dict):
            return
        if id(schema) in inside or len(inside) > MAX_DEPTH:
            yield f"{schema.get('name', 'a type')} contains itself, or nests deeper than {MAX_DEPTH} levels"
            return
        deeper = (*inside, id(schema))
        if schema["type"] == "array" and self._may_be_empty(schema["items"], deeper):
            yield "the items of an array have no content"
        inner = [field["type"] for field in schema.get("fields", [])]
        for each in [*inner, schema.get("items"), schema.get("values"), _nested(schema)]:
            yield from self.problems(each, deeper)

    def _may_be_empty(self, schema: Any, inside: tuple[int, ...]) -> bool:
        """Whether a value of this type may take no bytes at all."""
        schema = self._step(schema)
        if not isinstance(schema, dict):
            return bool(schema == "null")
        if id(schema) in inside or len(inside) > MAX_DEPTH:
            return True
        deeper = (*inside, id(schema))
        if isinstance(schema["type"], dict | list):
            return self._may_be_empty(schema["type"], deeper)
        if schema["type"] == "record":
            return all(self._may_be_empty(field["type"], deeper) for field in schema["fields"])
        return bool(schema["type"] == "null" or (schema["type"] == "fixed" and not schema["size"]))

    def _step(self, schema: Any) -> Any:
        """The schema behind a reference. A few types that name each other twice make a tree of 2**60 steps."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError(f"it has more than {MAX_STEPS} parts")
        if not isinstance(schema, str) or schema in self._names:
            return self._names[schema] if isinstance(schema, str) else schema
        return next((known for name, known in self._names.items() if name.endswith(f".{schema}")), schema)


def _nested(schema: dict[str, Any]) -> Any:
    return schema["type"] if isinstance(schema["type"], dict | list) else None


def without_text_uuids(schema: Any) -> Any:
    """The schema without the mark that makes fastavro build UUID objects from text: the bytes are the same."""
    if isinstance(schema, list):
        return [without_text_uuids(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "string":
        return {key: inner for key, inner in schema.items() if key != "logicalType"}
    changed = {key: without_text_uuids(schema[key]) for key in ("type", "items", "values") if key in schema}
    if "fields" in schema and isinstance(schema["fields"], list):
        changed["fields"] = [{**field, "type": without_text_uuids(field["type"])} for field in schema["fields"]]
    return {**schema, **changed}
