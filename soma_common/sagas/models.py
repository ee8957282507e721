"""Sagas as they are defined, and what may become of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic import ValidationError as Mismatch

from soma_common.errors import SagaDefinitionError
from soma_common.ranges import check_settings
from soma_common.sagas.context import SagaContext
from soma_common.sagas.parameters import INPUT, Call, From, Kind, Known, adapter_of
from soma_common.sagas.steps import (
    Ask,
    ForEach,
    Given,
    Parallel,
    Part,
    SagaStep,
    Signal,
    SubSaga,
    Timer,
    UndoPolicy,
    Unknown,
    When,
    parts_of,
    walk,
    with_compensation,
)
from soma_common.sagas.wiring import Wiring, has_pivot
from soma_common.tx import Tx

__all__ = [
    "Ask", "ForEach", "From", "Parallel", "Saga", "SagaContext", "SagaStatus", "SagaStep", "Signal", "SubSaga",
    "Timer", "Tx", "UndoPolicy", "Unknown", "When", "with_compensation",
]  # fmt: skip

_MOST_NAME: Final = 100
_DEADLINE: Final = 300.0  # seconds


class SagaStatus(StrEnum):
    """Where a saga stands.

    ``pending``: no worker took it yet. ``running``: forward, at work or waiting. ``compensating``: backward.
    ``completed``, ``compensated``: it ended. ``stuck``: it waits for a person, and has a dead letter.
    """

    PENDING = "pending"
    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    STUCK = "stuck"


ENDED: Final = (SagaStatus.COMPLETED, SagaStatus.COMPENSATED)


class Saga:
    """A definition: a name, what it is started with, and its parts in their order. A value; made once, at import.

        place_order = Saga("place-order", Order, reserve, SagaStep(pay, max_retries=5), SagaStep(ship, pivot=True))

    Everything that can be checked is checked here: names, types, and whether each parameter can be filled.

    Args:
        name: of the saga; running sagas find their definition by name and version.
        input_type: of what it is started with: a pydantic model, a dataclass, or one of JSON's own types.
        steps: functions, ``SagaStep``, ``Parallel``, ``When``, ``ForEach``, ``Timer``, ``Signal``, ``SubSaga``.
        version: rises when steps change; running sagas finish on the version they were started with.
        deadline: seconds after its start at which it turns around, unless it is behind its pivot.

    Raises:
        SagaDefinitionError: the message names the step and the parameter.
    """

    def __init__(
        self, name: str, input_type: Any, *steps: Given, version: int = 1, deadline: float = _DEADLINE
    ) -> None:
        self.name, self.version, self.deadline = name, version, deadline
        self.input_type = input_type
        check_settings(self, name=str, version=(1, 2**31 - 1), deadline=(0.001, 10 * 365 * 86_400.0))
        if not name or len(name) > _MOST_NAME or not name.isprintable():
            raise SagaDefinitionError(f"{name!r:.100} is no name of a saga.", cure=f"use at most {_MOST_NAME} letters.")
        self.input: TypeAdapter[Any] = adapter_of(input_type, f"Saga {name}: the input")
        self.parts: tuple[Part, ...] = parts_of(steps)
        self.has_pivot: bool = has_pivot(self.parts)
        wiring = Wiring(name)
        wiring.parts(self.parts, (Known(Kind.INPUT, INPUT, input_type),))
        self.calls: Mapping[str, Call] = MappingProxyType(wiring.calls)
        self.undos: Mapping[str, Call] = MappingProxyType(wiring.undos)
        self.results: Mapping[str, TypeAdapter[Any]] = MappingProxyType(wiring.results)
        self.by_name: Mapping[str, Any] = MappingProxyType(
            {p.name: p for p in walk(self.parts) if not isinstance(p, Parallel)}
        )
        self.result_type: Any = wiring.types.get(self.returns or "", type(None))

    @property
    def key(self) -> tuple[str, int]:
        """Name and version."""
        return self.name, self.version

    @property
    def type_id(self) -> int:
        """Stands for name and version in the database: 63 bits of their SHA-256."""
        return int.from_bytes(hashlib.sha256(f"{self.name}\0{self.version}".encode()).digest()[:8], "big") >> 1

    @property
    def pivots(self) -> list[str]:
        """The names of its pivots, those of sub-sagas included."""
        found: list[str] = []
        for part in walk(self.parts):
            if isinstance(part, SagaStep) and part.pivot:
                found.append(part.name)
            elif isinstance(part, SubSaga):
                found += part.saga.pivots
        return found

    @property
    def returns(self) -> str | None:
        """The name of the part whose result is the saga's: the last one, where it has a result."""
        last = self.parts[-1]
        return last.name if isinstance(last, SagaStep | Signal | SubSaga | Ask) else None

    @property
    def has_blocking_transactions(self) -> bool:
        """Whether steps of it, or of its sub-sagas, are plain functions with a transaction."""
        inner = (part.saga for part in walk(self.parts) if isinstance(part, SubSaga))
        calls = (*self.calls.values(), *self.undos.values())
        return any(c.blocking and c.transactional for c in calls) or any(s.has_blocking_transactions for s in inner)

    @property
    def asks(self) -> bool:
        """Whether it asks other services, itself or in a sub-saga."""
        return any(isinstance(p, Ask) or (isinstance(p, SubSaga) and p.saga.asks) for p in walk(self.parts))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for definitions with the same parts under the same names in the same order."""
        return hashlib.sha256(repr(shape(self.parts)).encode()).hexdigest()[:16]

    def number(self, name: str) -> int:
        """The place of a part in the definition, from 1."""
        return list(self.by_name).index(name) + 1

    def adapter(self, path: str) -> TypeAdapter[Any]:
        """Reads and writes the result of the step at a path of the journal."""
        saga, name = self._inner(path)
        return saga.results[name]

    def is_needed(self, path: str) -> bool:
        """Whether others cannot do without the result of the step at a path."""
        saga, name = self._inner(path)
        calls = (*saga.calls.values(), *(undo for step, undo in saga.undos.items() if step != name))
        takes = any(known.name == name and known.kind is Kind.RESULT for call in calls for _, known in call.sources)
        if not takes and saga.returns != name:
            return False
        try:
            saga.results[name].validate_python(None)
        except Mismatch:
            return True
        return False

    def _inner(self, path: str) -> tuple[Saga, str]:
        """The definition in which a path ends, and the name of its last part."""
        saga, (*around, name) = self, path.split("/")
        for each in around:
            part = saga.by_name[each.partition("[")[0]]
            saga = part.saga if isinstance(part, SubSaga) else saga
        return saga, name

    def __repr__(self) -> str:
        return f"Saga({self.name!r}, version={self.version})"


def check_sagas(sagas: Iterable[Saga]) -> tuple[Saga, ...]:
    """Definitions, each version of each once.

    Raises:
        SagaDefinitionError: something is none, or there are two of one name and version.
    """
    known: dict[tuple[str, int], Saga] = {}
    for saga in sagas:
        if not isinstance(saga, Saga):
            raise SagaDefinitionError(f"{saga!r:.100} is no Saga.", cure="pass Saga(name, Input, step, ...).")
        if known.setdefault(saga.key, saga) is not saga:
            raise SagaDefinitionError(
                f"There are two sagas {saga.name}, version {saga.version}.", cure="give one another name or version."
            )
    return tuple(known.values())


def shape(parts: Sequence[Part]) -> list[Any]:
    """What the journal depends on, as plain lists: kinds and names, in order."""
    found: list[Any] = []
    for part in parts:
        match part:
            case Parallel():
                found.append(["parallel", *map(shape, part.branches)])
            case When():
                found.append(["when", part.name, shape(part.then), shape(part.otherwise)])
            case ForEach():
                found.append(["for-each", part.name, shape(part.body)])
            case SubSaga():
                found.append(["saga", part.name, part.saga.name, part.saga.version, shape(part.saga.parts)])
            case SagaStep():
                found.append(["pivot" if part.pivot else "step", part.name])
            case _:
                found.append([type(part).__name__.lower(), part.name])
    return found
