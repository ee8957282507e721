"""Payloads: typed models, their registry, and the one way they become JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from soma_common.errors import ConfigurationError, EventTooLarge, PayloadInvalid
from soma_common.events.types import check_event_type

# Kafka's default limit for a record is 1 MiB; envelope and framing need some of it.
MAX_PAYLOAD_BYTES = 900 * 1024
MAX_METADATA_BYTES = 64 * 1024
# 19 digits and more may be beyond 64 bits: readers would round such a number, or fail on it.
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19


class Payload(BaseModel):
    """Base of typed payloads: ``class OrderPlaced(Payload, event_type="order.placed", version=1): ...``

    Frozen, unknown fields are refused, and NaN and infinities too (JSON has none).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    event_type: ClassVar[str]
    schema_version: ClassVar[int]

    def __init_subclass__(cls, *, event_type: str | None = None, version: int = 1, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if event_type is not None:
            cls.event_type = check_event_type(event_type)
            cls.schema_version = version


class PayloadModels(Mapping[tuple[str, int], type[Payload]]):
    """The payload models of an application by (event type, schema version). A value: nothing is registered globally."""

    def __init__(self, *models: type[Payload]) -> None:
        self._models: dict[tuple[str, int], type[Payload]] = {}
        for model in models:
            if not hasattr(model, "event_type"):
                raise ConfigurationError(
                    f"{model.__name__} has no event type.",
                    cure=f'declare it: class {model.__name__}(Payload, event_type="..."): ...',
                )
            key = (model.event_type, model.schema_version)
            if self._models.setdefault(key, model) is not model:
                raise ConfigurationError(
                    f"{model.__name__} and {self._models[key].__name__} are both {key[0]} version {key[1]}.",
                    cure="give one of them another event type or version.",
                )
        self._latest = dict(sorted(self._models))

    def __getitem__(self, key: tuple[str, int]) -> type[Payload]:
        return self._models[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def of(self, event_type: str, version: int) -> type[Payload] | None:
        """The model of a type's version, if it is known. Quicker than Mapping's own ``get``."""
        return self._models.get((event_type, version))

    def latest(self, event_type: str) -> int | None:
        """The highest known schema version of a type."""
        return self._latest.get(event_type)


def check_payload(payload: Any, model: type[Payload] | None) -> Any:
    """The payload as its model, or unchanged where there is no model.

    Raises:
        PayloadInvalid: it does not match; the message names the fields.
    """
    if model is None or isinstance(payload, model):
        return payload
    try:
        return model.model_validate(payload.model_dump() if isinstance(payload, BaseModel) else payload)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'payload'}: {e['msg']}" for e in error.errors()[:5])
        raise PayloadInvalid(
            f"The payload does not match {model.__name__} ({model.event_type} v{model.schema_version}): {fields}.",
            cure="mend these fields, or publish under another event type.",
        ) from error


def to_json(what: str, value: Any, limit: int) -> bytes:
    """UTF-8 JSON of a payload or metadata: an object, without NaN, infinities, NUL characters or lone surrogates.

    Raises:
        PayloadInvalid: it is not an object, or holds something that JSON or PostgreSQL cannot keep.
        EventTooLarge: more than ``limit`` bytes.
    """
    if type(value) is dict:  # mostly; told without asking an abstract class
        text = _dump(what, value)
    elif isinstance(value, Payload):
        text = _dump_model(what, value)
    elif isinstance(value, Mapping | BaseModel):
        text = _dump(what, value)
    else:
        raise PayloadInvalid(f"{what} is a {type(value).__name__}, not an object.", cure="pass a model or a mapping.")
    return check_json(what, text, limit)


def check_json(what: str, text: bytes, limit: int) -> bytes:
    """The same JSON text, if PostgreSQL and every reader can keep it as it is.

    Raises:
        PayloadInvalid: it has NaN, infinities, NUL characters or numbers that are too long.
        EventTooLarge: more than ``limit`` bytes.
    """
    if len(text) > limit:
        raise EventTooLarge(
            f"{what} has {len(text)} bytes of JSON.", cure=f"use at most {limit}, and keep large data elsewhere."
        )
    # Searching bytes is nearly free; only a suspect is read again. pydantic writes NaN as NaN here, not as null.
    # By `find`: `in` tries bytes as a number first, and its hidden exception takes longer than the search.
    find = text.find
    if (
        find(b"NaN") >= 0
        or find(b"Infinity") >= 0
        or find(b"\\u0000") >= 0
        or text.translate(_DIGITS_TO_ZERO).find(_LONG_NUMBER) >= 0
    ):
        _refuse_unstorable(what, text)
    return text


def _dump_model(what: str, value: Payload) -> bytes:
    missing = type(value).__pydantic_fields__.keys() - value.__dict__.keys()
    if missing:  # only model_construct makes such a thing
        raise PayloadInvalid(f"{what} has no {', '.join(sorted(missing))}.", cure="give these fields a value.")
    try:
        return value.__pydantic_serializer__.to_json(value, warnings="error")
    except (pydantic_core.PydanticSerializationError, ValueError, RecursionError) as error:
        raise _unwritable(what, error) from error


def _dump(what: str, value: Any) -> bytes:
    try:
        return pydantic_core.to_json(value, inf_nan_mode="constants")
    except (pydantic_core.PydanticSerializationError, ValueError, RecursionError) as error:
        raise _unwritable(what, error) from error


def _unwritable(what: str, error: Exception) -> PayloadInvalid:
    cause = str(error).splitlines()[0][:300]
    return PayloadInvalid(
        f"{what} cannot be written as JSON: {cause}.", cure="use JSON's types and valid Unicode only."
    )


def _refuse_unstorable(what: str, text: bytes) -> None:
    """Raise PayloadInvalid, naming the place, for what JSON, PostgreSQL or a reader cannot keep as it is."""
    _walk(what, json.loads(text), "")


def _walk(what: str, value: Any, path: str) -> None:
    where = path[:200] or "the top"
    if isinstance(value, float) and not math.isfinite(value):
        raise PayloadInvalid(f"{what} holds {value} at {where}.", cure="JSON has no such number: use null or text.")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise PayloadInvalid(f"{what} holds a number beyond 64 bits at {where}.", cure="write it as text.")
    if isinstance(value, str) and "\0" in value:
        raise PayloadInvalid(f"{what} holds a NUL character at {where}.", cure="remove it: PostgreSQL cannot keep it.")
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(what, key, f"{path}.{key}")
            _walk(what, inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _walk(what, inner, f"{path}[{index}]")
