"""How the parameters of actions, compensations and rules are filled: by their annotations, checked at definition."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from soma_common.errors import SagaDefinitionError
from soma_common.sagas.context import SagaContext
from soma_common.tx import Tx

Function = Callable[..., Any]
INPUT: Final = "input"  # the name of what the saga was started with


@dataclass(frozen=True, slots=True)
class From:
    """Says whose value a parameter takes, where its type alone does not: ``Annotated[str, From("reserve")]``.

    ``step`` is the name of an earlier step, of a loop (its item), or ``input``.
    """

    step: str


class Kind(StrEnum):
    """What a parameter is filled with."""

    INPUT = "input"
    RESULT = "result"
    RESULTS = "results"  # of a step inside of a loop, seen from behind the loop
    ITEM = "item"
    OWN = "own"  # of a compensation: what its step returned
    EVENT = "event"  # of a choreography: the event as it was recorded
    TX = "tx"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class Known:
    """A value that a function may ask for.

    ``depth``: how many loops stand around the step it comes from. ``certain``: it is there whenever the function is
    called; not so where it stands in a branch that may be passed over.
    """

    kind: Kind
    name: str
    type: Any
    depth: int = 0
    certain: bool = True
    loop: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as it is written."""

    name: str
    type: Any
    step: str | None
    optional: bool
    has_default: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A function with what each of its parameters is filled with."""

    function: Function
    sources: tuple[tuple[str, Known], ...]
    blocking: bool

    @property
    def transactional(self) -> bool:
        """Whether it takes the transaction in which its outcome is recorded."""
        return any(known.kind is Kind.TX for _, known in self.sources)


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's parameters and what it returns. ``where`` names it in errors."""

    function: Function
    where: str
    parameters: tuple[Parameter, ...]
    returns: Any
    blocking: bool

    @classmethod
    def of(cls, function: Function, where: str, *, rule: bool = False) -> Signature:
        """Read a function. A ``rule`` decides from what is known; its lone parameter may go without annotation, and
        then takes the input.

        Raises:
            SagaDefinitionError: it is no function, or a parameter cannot be filled by its annotation.
        """
        if not callable(function) or isinstance(function, type):
            raise SagaDefinitionError(f"{where}: {function!r:.100} is no function.", cure="pass a function.")
        call = function if inspect.isroutine(function) else type(function).__call__
        if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
            raise SagaDefinitionError(f"{where} is a generator, and nobody would run it.", cure="remove `yield`.")
        hints = _hints(call, where)
        found = tuple(_parameters(function, where, hints, rule))
        blocking = not inspect.iscoroutinefunction(call)
        return cls(function, where, found, hints.get("return", Any), blocking)

    def bound(self, known: Sequence[Known]) -> Call:
        """Match each parameter with what is known at its place.

        Raises:
            SagaDefinitionError: nothing fits, or several do; the message names the parameter, the cure what to write.
        """
        sources = []
        for parameter in self.parameters:
            source = _source(parameter, known, self.where)
            if source is not None:
                sources.append((parameter.name, source))
        return Call(self.function, tuple(sources), self.blocking)


def adapter_of(wanted: Any, where: str) -> TypeAdapter[Any]:
    """Reads and writes values of a type as JSON.

    Raises:
        SagaDefinitionError: pydantic knows no way to write such values.
    """
    try:
        return TypeAdapter(wanted)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
        raise SagaDefinitionError(
            f"{where} has type {_named(wanted)}, which cannot be written as JSON: {str(error).splitlines()[0]}",
            cure="use a pydantic model, a dataclass, or JSON's own types.",
        ) from error


def _hints(call: Any, where: str) -> dict[str, Any]:
    try:
        return get_type_hints(call, include_extras=True)
    except Exception as error:  # whatever evaluating an annotation raises
        raise SagaDefinitionError(
            f"{where}: an annotation cannot be evaluated: {error}.",
            cure="import its name at run time, not under TYPE_CHECKING, and at the top of the module.",
        ) from error


def _parameters(function: Function, where: str, hints: dict[str, Any], rule: bool) -> Iterable[Parameter]:
    given = inspect.signature(function).parameters
    for name, parameter in given.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise SagaDefinitionError(
                f"{where}: parameter {parameter} cannot be filled by its annotation.",
                cure="give it a name that can be passed as a keyword.",
            )
        has_default = parameter.default is not parameter.empty
        if name in hints:
            step, kind = _unwrapped(hints[name], where, name)
            optional, kind = _optional(kind)
            yield Parameter(name, kind, step, optional, has_default)
        elif rule and len(given) == 1:
            yield Parameter(name, Any, INPUT, False, has_default)
        elif not has_default:
            raise SagaDefinitionError(
                f"{where}: parameter {name} has no annotation.",
                cure="annotate it with the input's type, an earlier step's result type, Tx or SagaContext.",
            )


def _unwrapped(hint: Any, where: str, name: str) -> tuple[str | None, Any]:
    """Whose value it is, if that is said, and the type without it."""
    if get_origin(hint) is not Annotated:
        return None, hint
    kind, *extras = get_args(hint)
    steps = [extra.step for extra in extras if isinstance(extra, From)]
    if len(steps) > 1:
        raise SagaDefinitionError(f"{where}: parameter {name} names {len(steps)} steps.", cure="name one.")
    rest = tuple(extra for extra in extras if not isinstance(extra, From))
    return (steps[0] if steps else None), (Annotated[(kind, *rest)] if rest else kind)


def _optional(kind: Any) -> tuple[bool, Any]:
    """Whether None is allowed, and the type without it."""
    if get_origin(kind) not in (Union, types.UnionType):
        return False, kind
    members = [member for member in get_args(kind) if member is not type(None)]
    if len(members) == len(get_args(kind)):
        return False, kind
    return True, Union[tuple(members)]  # noqa: UP007 - of a tuple; with one member it is that type


def _source(parameter: Parameter, known: Sequence[Known], where: str) -> Known | None:
    if parameter.type is Tx:
        return Known(Kind.TX, "tx", Tx)
    if parameter.type is SagaContext:
        return Known(Kind.CONTEXT, "ctx", SagaContext)
    if parameter.step is not None:
        fitting = [each for each in known if each.name == parameter.step]
        if not fitting:
            raise SagaDefinitionError(
                f"{where}: parameter {parameter.name} asks for {parameter.step!r}, which is not known there.",
                cure=f"known are: {_listed(known)}.",
            )
        _check_type(parameter, fitting[0], where)
    else:
        fitting = [each for each in known if _fits(parameter, each)]
    own = [each for each in fitting if each.kind is Kind.OWN]
    fitting = own or fitting
    if len(fitting) > 1:
        names = " or ".join(f'From("{each.name}")' for each in fitting)
        raise SagaDefinitionError(
            f"{where}: several values have the type of parameter {parameter.name}, {_named(parameter.type)}.",
            cure=f"say which one is meant: {parameter.name}: Annotated[{_named(parameter.type)}, {names}].",
        )
    if not fitting:
        if parameter.has_default:
            return None
        raise SagaDefinitionError(
            f"{where}: nothing known there has the type of parameter {parameter.name}, {_named(parameter.type)}.",
            cure=f"known are: {_listed(known)}; besides, Tx and SagaContext.",
        )
    if not fitting[0].certain and not parameter.optional:
        raise SagaDefinitionError(
            f"{where}: parameter {parameter.name} takes the result of {fitting[0].name}, which may not be there.",
            cure=f"annotate it {parameter.name}: {_named(parameter.type)} | None.",
        )
    return fitting[0]


def _fits(parameter: Parameter, known: Known) -> bool:
    if known.type is type(None) or parameter.type is Any:
        return False
    return bool(parameter.type == _optional(known.type)[1])


def _check_type(parameter: Parameter, known: Known, where: str) -> None:
    if parameter.type is not Any and known.type is not Any and not _fits(parameter, known):
        raise SagaDefinitionError(
            f"{where}: parameter {parameter.name} is a {_named(parameter.type)}, and {known.name} gives a "
            f"{_named(known.type)}.",
            cure="make them the same type.",
        )


def _listed(known: Sequence[Known]) -> str:
    return ", ".join(f"{each.name} ({_named(each.type)})" for each in known) or "nothing"


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
