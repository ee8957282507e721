"""Inputs and results as JSON, and what the parameters of a function are filled with."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import pydantic_core
from pydantic import TypeAdapter
from pydantic import ValidationError as Mismatch

from soma_common.clock import utc_now
from soma_common.errors import PayloadInvalid, ValidationError
from soma_common.events.payloads import check_json
from soma_common.sagas.context import SagaContext
from soma_common.sagas.journal import Journal
from soma_common.sagas.machine import Work, item_of, length
from soma_common.sagas.models import Saga
from soma_common.sagas.parameters import Call, Kind, Known
from soma_common.sagas.steps import SubSaga
from soma_common.tx import Tx

ANY: Final[TypeAdapter[Any]] = TypeAdapter(Any)
_LONGEST: Final = 10 * 365 * 86_400.0  # seconds
MOST_VALUE: Final = 900 * 1024
"""Bytes of JSON that an input, a result or a signal may have."""


def encode(adapter: TypeAdapter[Any], value: Any, what: str) -> bytes:
    """JSON of a value of the adapter's type.

    Raises:
        PayloadInvalid: it is not of that type, or PostgreSQL could not keep it.
        EventTooLarge: more than ``MOST_VALUE`` bytes.
    """
    try:
        text = adapter.dump_json(adapter.validate_python(value), warnings="error")
    except Mismatch as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the value"
        raise PayloadInvalid(f"{what}: {where}: {first['msg']}.", cure="pass what its annotation says.") from error
    except (pydantic_core.PydanticSerializationError, ValueError, RecursionError) as error:
        raise PayloadInvalid(f"{what} cannot be written as JSON: {str(error).splitlines()[0]:.300}.") from error
    return check_json(what, text, MOST_VALUE)


def encode_any(value: Any, what: str) -> bytes:
    """JSON of a value of whatever type; the errors are those of ``encode``."""
    return encode(ANY, value, what)


def seconds_of(wait: Any) -> float:
    """Seconds in what a timer's rule said: a number, a timedelta, or a moment."""
    if isinstance(wait, timedelta):
        wait = wait.total_seconds()
    elif isinstance(wait, datetime) and wait.tzinfo is not None:
        wait = (wait - utc_now()).total_seconds()
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not wait < _LONGEST:
        raise ValidationError(
            f"A timer waits for {wait!r:.80}.", cure="give seconds, a timedelta, or a moment with a zone."
        )
    return max(0.0, float(wait))


def decode(adapter: TypeAdapter[Any], text: bytes | None) -> Any:
    """The value in a JSON text; None for none."""
    return None if text is None else adapter.validate_json(text)


class Values:
    """What is known in a saga, as values: its input, and the results in its journal."""

    def __init__(self, saga: Saga, given: bytes) -> None:
        self._saga, self._given = saga, given

    def arguments(
        self, call: Call, work: Work, journal: Journal, *, tx: Tx | None, context: SagaContext | None
    ) -> dict[str, Any]:
        """What a function is called with."""
        filled: dict[str, Any] = {}
        for name, known in call.sources:
            if known.kind is Kind.TX:
                filled[name] = tx
            elif known.kind is Kind.CONTEXT:
                filled[name] = context
            else:
                filled[name] = self._value(known, work, journal)
        return filled

    def _value(self, known: Known, work: Work, journal: Journal) -> Any:
        saga, depth = work.saga, work.inside + known.depth
        match known.kind:
            case Kind.INPUT:
                return self._input(work, journal)
            case Kind.OWN:
                return decode(saga.results[known.name], journal.of_step(work.path).result)
            case Kind.ITEM:
                segment = work.prefix[depth - 1]
                place = _path(work.prefix[: depth - 1], known.name)
                items = decode(saga.results[known.name], journal.of_step(place).result)
                return items[int(segment[len(known.name) + 1 : -1])]
            case Kind.RESULT:
                return _result(saga, known.name, work.prefix[:depth], journal)
            case _:
                base = work.prefix[:depth]
                count = length(journal.of_step(_path(base, known.loop)))
                return [_result(saga, known.name, (*base, item_of(known.loop, n)), journal) for n in range(count)]

    def _input(self, work: Work, journal: Journal) -> Any:
        if not work.inside:
            return decode(work.saga.input, self._given)
        return decode(work.saga.input, journal.of_step("/".join(work.prefix[: work.inside])).result)

    def result(self, journal: Journal) -> bytes | None:
        """The result of the whole saga as JSON, where it has one."""
        return _text(self._saga, self._saga.returns, (), journal)


def _result(saga: Saga, name: str, prefix: tuple[str, ...], journal: Journal) -> Any:
    return decode(saga.results[name], _text(saga, name, prefix, journal))


def _text(saga: Saga, name: str | None, prefix: tuple[str, ...], journal: Journal) -> bytes | None:
    """The JSON of a step's result; that of a sub-saga is what its last step gave."""
    if name is None:
        return None
    part = saga.by_name[name]
    if isinstance(part, SubSaga):
        return _text(part.saga, part.saga.returns, (*prefix, name), journal)
    return journal.of_step(_path(prefix, name)).result


def _path(prefix: tuple[str, ...], name: str) -> str:
    return "/".join((*prefix, name))
