"""Values of the types that payload models are made of, as hypothesis strategies."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin
from uuid import UUID

from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, AwareDatetime, BaseModel, JsonValue, NaiveDatetime, ValidationError
from pydantic.fields import FieldInfo

from soma_common.testing.bounds import Bounds

Strategy = st.SearchStrategy[Any]

_MOST: Final = 3  # elements of a collection beyond the fewest that it must have
_LENGTH: Final = 20  # of texts, alike
_EARLY, _LATE = datetime(2, 1, 1), datetime(9998, 1, 1)  # noqa: DTZ001 - hypothesis wants them without a zone
_SIGNS: Final = st.characters(codec="utf-8", exclude_characters="\0")
_TEXTS: Final = st.text(_SIGNS, max_size=8)
_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS,
    lambda inner: st.lists(inner, max_size=_MOST) | st.dictionaries(_TEXTS, inner, max_size=_MOST),
    max_leaves=6,
)  # fmt: skip


class Maker:
    """Makes strategies for types. One per model that is asked for, since a model may hold itself."""

    def __init__(self) -> None:
        self._models: dict[type[BaseModel], Strategy] = {}
        self._config: Mapping[str, Any] = {}

    def model(self, model: type[BaseModel], fixed: Mapping[str, Strategy] = {}) -> Strategy:
        """Instances of a model. Where it has rules that its fields do not tell, only those that obey them."""
        known = self._models.get(model)
        if known is not None:
            return known
        self._models[model] = st.deferred(lambda: made)
        outer, self._config = self._config, model.model_config
        needed: dict[str, Strategy] = {}
        optional: dict[str, Strategy] = {}
        for name, field in model.model_fields.items():
            values = fixed[name] if name in fixed else self.of(field.annotation, tuple(field.metadata), name)
            (needed if field.is_required() or name in fixed else optional)[_key(name, field)] = values
        self._config = outer
        made = st.fixed_dictionaries(needed, optional=optional).map(_tried(model)).filter(lambda one: one is not None)
        return made

    def of(self, kind: Any, metadata: tuple[Any, ...] = (), where: str = "it") -> Strategy:
        """Values of a type.

        Raises:
            TypeError: nothing is known of it; names the field.
        """
        origin, inner = get_origin(kind), get_args(kind)
        if kind is not JsonValue and hasattr(kind, "__value__"):  # type X = ...
            return self.of(kind.__value__, metadata, where)
        if origin is Annotated:
            return self.of(inner[0], (*inner[1:], *metadata), where)
        bounds = Bounds(metadata)
        if bounds.pattern is not None:
            return st.from_regex(bounds.pattern, alphabet=_SIGNS).filter(bounds.allows_text)
        if origin in (Union, types.UnionType):
            return st.one_of([self.of(one, (), where) for one in inner])
        if origin is Literal:
            return st.sampled_from(inner)
        if origin is not None:
            return self._collection(origin, inner, bounds, where)
        return self._plain(kind, bounds, where)

    def _collection(self, origin: Any, inner: tuple[Any, ...], bounds: Bounds, where: str) -> Strategy:
        least, most = bounds.sizes(_MOST)
        if origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
            return st.tuples(*(self.of(one, (), where) for one in inner))
        elements = self.of(inner[0], (), where)
        if origin is tuple:
            return st.lists(elements, min_size=least, max_size=most).map(tuple)
        if origin in (set, frozenset):
            return st.frozensets(elements, min_size=least, max_size=most).map(origin)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return st.dictionaries(elements, self.of(inner[1], (), where), min_size=least, max_size=most)
        if isinstance(origin, type) and issubclass(list, origin):  # list, Sequence, Collection, Iterable
            return st.lists(elements, min_size=least, max_size=most)
        raise _unknown(origin, where)

    def _plain(self, kind: Any, bounds: Bounds, where: str) -> Strategy:
        if kind in _OF:
            return _OF[kind](bounds)
        if kind is bytes:
            return self._bytes(bounds)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return st.sampled_from(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self.model(kind)
        raise _unknown(kind, where)

    def _bytes(self, bounds: Bounds) -> Strategy:
        """In JSON they are UTF-8 text, unless the model says base64."""
        least, most = bounds.sizes(_LENGTH)
        if self._config.get("ser_json_bytes", "utf8") != "utf8":
            return st.binary(min_size=least, max_size=most)
        return st.text(_SIGNS, min_size=least, max_size=most).map(str.encode).filter(lambda value: len(value) <= most)


def _unknown(kind: Any, where: str) -> TypeError:
    return TypeError(f"{where}: nothing is known here of {kind}; name a strategy for it: {where}=st.just(...).")


def _key(name: str, field: FieldInfo) -> str:
    """What a field is called in the values that the model takes."""
    alias = field.validation_alias if field.validation_alias is not None else field.alias
    if isinstance(alias, AliasChoices):
        alias = alias.choices[0]
    if isinstance(alias, AliasPath):
        raise TypeError(f"{name}: it is taken out of another field ({alias}).")
    return alias or name


def _tried(model: type[BaseModel]) -> Callable[[dict[str, Any]], BaseModel | None]:
    def make(fields: dict[str, Any]) -> BaseModel | None:
        try:
            return model.model_validate(fields)
        except ValidationError:
            return None

    return make


def _integers(bounds: Bounds) -> Strategy:
    low, high = bounds.integers(-(2**63), 2**63 - 1)
    if isinstance(bounds.multiple, int):
        step = bounds.multiple
        return st.integers(-(-low // step), high // step).map(lambda number: number * step)
    return st.integers(low, high).filter(bounds.allows)


def _floats(bounds: Bounds) -> Strategy:
    low, high = (None if bound is None else float(bound) for bound in (bounds.low(), bounds.high()))
    return st.floats(low, high, allow_nan=False, allow_infinity=False).filter(bounds.allows)


def _decimals(bounds: Bounds) -> Strategy:
    places = 2 if bounds.places is None and bounds.low() is not None else bounds.places
    numbers = st.decimals(bounds.low(), bounds.high(), allow_nan=False, allow_infinity=False, places=places)
    return numbers.filter(bounds.allows)


def _text(bounds: Bounds) -> Strategy:
    least, most = bounds.sizes(_LENGTH)
    return st.text(_SIGNS, min_size=least, max_size=most)


def _bounded(values: Strategy) -> Callable[[Bounds], Strategy]:
    """Of a kind whose bounds are rare: what they do not allow is thrown away."""

    def within(bounds: Bounds) -> Strategy:
        low, high = bounds.low(), bounds.high()
        if low is None and high is None:
            return values
        return values.filter(
            lambda value: (low is None or value >= low) and (high is None or value <= high) and bounds.allows(value)
        )

    return within


_AWARE: Final = st.datetimes(_EARLY, _LATE, timezones=st.just(UTC))
_NAIVE: Final = st.datetimes(_EARLY, _LATE)
_OF: Final[Mapping[Any, Callable[[Bounds], Strategy]]] = {
    bool: lambda bounds: st.booleans(),
    int: _integers,
    float: _floats,
    Decimal: _decimals,
    str: _text,
    UUID: lambda bounds: st.uuids(),
    datetime: _bounded(_AWARE),
    AwareDatetime: _bounded(_AWARE),
    NaiveDatetime: _bounded(_NAIVE),
    date: _bounded(st.dates()),
    time: _bounded(st.times()),
    timedelta: _bounded(st.timedeltas()),
    type(None): lambda bounds: st.none(),
    None: lambda bounds: st.none(),
    Any: lambda bounds: _JSON,
    JsonValue: lambda bounds: _JSON,
    dict: lambda bounds: st.dictionaries(_TEXTS, _JSON, max_size=_MOST),
    list: lambda bounds: st.lists(_JSON, max_size=_MOST),
}
