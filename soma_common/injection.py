"""A parameter of type ``Tx`` that a decorator fills: found by its annotation, and hidden from callers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from soma_common.errors import ConfigurationError
from soma_common.tx import Tx

_WRITTEN = ("Tx", "soma_common.Tx", "Tx | None", "Optional[Tx]")


@dataclass(frozen=True, slots=True)
class TxParameter:
    """Where a function takes its transaction. ``place`` is None where it can be given by name only."""

    name: str
    place: int | None
    by_place_only: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> TxParameter | None:
        """The parameter of a function that is annotated ``Tx``, if it has one.

        Raises:
            ConfigurationError: it has two.
        """
        hints = _hints(function)
        parameters = inspect.signature(function).parameters
        found = [(place, p) for place, p in enumerate(parameters.values()) if _is_tx(hints.get(p.name))]
        if len(found) > 1:
            raise ConfigurationError(f"{_name(function)} takes two transactions.", cure="annotate one as Tx.")
        if not found:
            return None
        place, parameter = found[0]
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        return cls(parameter.name, place if positional else None, parameter.kind == parameter.POSITIONAL_ONLY)

    def filled(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tx: Tx
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with the transaction in its place.

        Raises:
            TypeError: the caller gave one.
        """
        if self.name in kwargs:
            raise TypeError(f"{self.name!r} is filled in; leave it out")
        if self.place is not None and (self.by_place_only or self.place < len(args)):
            return (*args[: self.place], tx, *args[self.place :]), dict(kwargs)
        return args, {**kwargs, self.name: tx}


def hide(wrapper: Callable[..., Any], function: Callable[..., Any], parameter: TxParameter | None) -> None:
    """Give a wrapper the signature of its function without the parameter: to FastAPI each is a part of the request."""
    if parameter is None:
        return
    signature = inspect.signature(function)
    left = [p for p in signature.parameters.values() if p.name != parameter.name]
    wrapper.__dict__["__signature__"] = signature.replace(parameters=left)
    wrapper.__annotations__ = {n: a for n, a in wrapper.__annotations__.items() if n != parameter.name}


def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return get_type_hints(function)
    except Exception:  # a name that exists for type checkers only: then as it is written
        return getattr(function, "__annotations__", {})


def _is_tx(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return annotation.strip() in _WRITTEN
    return annotation is Tx or Tx in get_args(annotation)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
