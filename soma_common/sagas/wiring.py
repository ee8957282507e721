"""Checks a definition part by part, and finds what the parameters of its functions are filled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, get_args, get_origin

from pydantic import TypeAdapter

from soma_common.errors import SagaDefinitionError
from soma_common.events.models import Event
from soma_common.sagas.parameters import Call, Function, Kind, Known, Signature, adapter_of
from soma_common.sagas.steps import Ask, ForEach, Parallel, Part, SagaStep, Signal, SubSaga, Timer, Unknown, When, walk

Scope = tuple[Known, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part stands: inside of how many loops, and of what from which there must be a way back."""

    depth: int = 0
    one_way: str = ""


_TOP: Final = _Place()


class Wiring:
    """Checks a definition part by part, and finds what each function's parameters are filled with."""

    def __init__(self, saga: str) -> None:
        self._saga = saga
        self.calls: dict[str, Call] = {}
        self.undos: dict[str, Call] = {}
        self.results: dict[str, TypeAdapter[Any]] = {}
        self.types: dict[str, Any] = {}
        self._names: set[str] = set()

    def parts(self, parts: Sequence[Part], scope: Scope, place: _Place = _TOP) -> Scope:
        """Wire parts that follow each other; what is known behind them."""
        for part in parts:
            scope = self._part(part, scope, place)
        return scope

    def _part(self, part: Part, scope: Scope, place: _Place) -> Scope:
        if not isinstance(part, Parallel):
            self._name(part.name)
        match part:
            case SagaStep():
                return self._step(part, scope, place)
            case Parallel():
                return self._parallel(part, scope, place)
            case When():
                return self._when(part, scope, place)
            case ForEach():
                return self._for_each(part, scope, place)
            case Timer():
                if callable(part.wait):
                    self._rule(part.name, part.wait, scope)
                return scope
            case Signal():
                kind = part.payload | None if part.optional else part.payload
                return (*scope, self._result(part.name, kind, place))
            case SubSaga():
                return self._sub_saga(part, scope, place)
            case Ask():
                return self._ask(part, scope, place)

    def _step(self, part: SagaStep, scope: Scope, place: _Place) -> Scope:
        where = self._where(part.name)
        if part.pivot and place.one_way:
            raise SagaDefinitionError(
                f"{where} is a pivot inside of {place.one_way}: others beside it could still fail.",
                cure="put it behind.",
            )
        signature = Signature.of(part.action, where)
        call = self.calls[part.name] = signature.bound(scope)
        if call.transactional and part.unknown is not Unknown.RETRY:
            raise SagaDefinitionError(
                f"{where} is transactional: it is always known whether it took effect.", cure="leave unknown= away."
            )
        result = self._result(part.name, signature.returns, place)
        if part.compensation is not None:
            own = Known(Kind.OWN, part.name, signature.returns, place.depth, part.unknown is not Unknown.COMPENSATE)
            undo = Signature.of(part.compensation, f"{where}, its compensation")
            self.undos[part.name] = undo.bound((*scope, own))
        return (*scope, result)

    def _parallel(self, part: Parallel, scope: Scope, place: _Place) -> Scope:
        inner = replace(place, one_way="a parallel group")
        behind = scope
        for branch in part.branches:
            behind += self.parts(branch, scope, inner)[len(scope) :]
        return behind

    def _when(self, part: When, scope: Scope, place: _Place) -> Scope:
        self._rule(part.name, part.condition, scope)
        self.results[part.name] = TypeAdapter(bool)
        behind = scope
        for branch in (part.then, part.otherwise):
            known = self.parts(branch, scope, place)[len(scope) :]
            behind += tuple(replace(each, certain=False) for each in known)
        return behind

    def _for_each(self, part: ForEach, scope: Scope, place: _Place) -> Scope:
        where = self._where(part.name)
        signature = self._rule(part.name, part.items, scope)
        item = _item_type(signature.returns, where)
        self.results[part.name] = adapter_of(list[item], f"{where}: the list")  # type: ignore[valid-type] # by value
        inner = _Place(place.depth + 1, f"the loop {part.name}")
        within = (*scope, Known(Kind.ITEM, part.name, item, place.depth + 1))
        known = self.parts(part.body, within, inner)[len(within) :]
        return scope + tuple(_gathered(each, part.name) for each in known if each.kind is Kind.RESULT)

    def _sub_saga(self, part: SubSaga, scope: Scope, place: _Place) -> Scope:
        where, saga = self._where(part.name), part.saga
        if place.one_way and has_pivot(saga.parts):
            raise SagaDefinitionError(f"{where} has a pivot, inside of {place.one_way}.", cure="put it behind.")
        if part.input is not None:
            self._rule(part.name, part.input, scope)
        else:
            self.calls[part.name] = _handed_on(saga.input_type, scope, where)
        return (*scope, self._result(part.name, saga.result_type, place))

    def _ask(self, part: Ask, scope: Scope, place: _Place) -> Scope:
        makers = [(self._rule(part.name, part.command, scope), "its command")]
        answered = self._result(part.name, part.reply, place)
        if part.compensation is not None:
            own = Known(Kind.OWN, part.name, part.reply, place.depth, certain=False)
            undo = Signature.of(part.compensation, f"{self._where(part.name)}, its compensation", rule=True)
            self.undos[part.name] = self._deciding(undo, (*scope, own))
            makers.append((undo, "its compensation"))
        for signature, what in makers:
            if signature.returns is not Event:
                raise SagaDefinitionError(
                    f"{self._where(part.name)}: {what} makes no event.",
                    cure="annotate the function: def command(...) -> Event.",
                )
        return (*scope, answered)

    def _rule(self, name: str, function: Function, scope: Scope) -> Signature:
        signature = Signature.of(function, f"{self._where(name)}, its rule", rule=True)
        self.calls[name] = self._deciding(signature, scope)
        return signature

    def _deciding(self, signature: Signature, scope: Scope) -> Call:
        """A call of a function that has nothing but what it is given."""
        call = signature.bound(scope)
        if call.transactional or not call.blocking or any(known.kind is Kind.CONTEXT for _, known in call.sources):
            raise SagaDefinitionError(
                f"{signature.where} must decide from what it is given.",
                cure="make it a plain function without Tx and SagaContext; do the rest in a step before it.",
            )
        return call

    def _result(self, name: str, kind: Any, place: _Place) -> Known:
        kind = type(None) if kind is None else kind
        self.results[name] = adapter_of(kind, f"{self._where(name)}: the result")
        self.types[name] = kind
        return Known(Kind.RESULT, name, kind, place.depth)

    def _name(self, name: str) -> None:
        if name in self._names:
            raise SagaDefinitionError(
                f"{self._where(name)}: there are two of this name.",
                cure="give one another name: SagaStep(..., name=...).",
            )
        self._names.add(name)

    def _where(self, name: str) -> str:
        return f"Saga {self._saga}, step {name}"


def has_pivot(parts: Sequence[Part]) -> bool:
    """Whether one of the parts is a pivot, those of sub-sagas included."""
    return any(
        part.pivot if isinstance(part, SagaStep) else isinstance(part, SubSaga) and has_pivot(part.saga.parts)
        for part in walk(parts)
    )


def _gathered(known: Known, loop: str) -> Known:
    """What a step inside of a loop gave, seen from behind the loop: a list, or a list that may have gaps."""
    kind: Any = known.type if known.certain else known.type | None
    return Known(Kind.RESULTS, known.name, list[kind], known.depth - 1, loop=loop)


def _handed_on(wanted: Any, scope: Scope, where: str) -> Call:
    """What a sub-saga is started with, where no function makes it: the one value of its input's type."""

    def handed_on(value: Any) -> Any:
        return value

    handed_on.__annotations__ = {"value": wanted}
    return Signature.of(handed_on, f"{where}, its input").bound(scope)


def _item_type(returns: Any, where: str) -> Any:
    if get_origin(returns) is list and len(get_args(returns)) == 1:
        return get_args(returns)[0]
    raise SagaDefinitionError(
        f"{where}: its items have no type.", cure="annotate the function that lists them: def items(...) -> list[Item]."
    )
