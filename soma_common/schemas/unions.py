"""The branches of an Avro union, merged so that each JSON value fits exactly one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from soma_common.schemas.forms import json_type, kind_of, literal_field

# null first is Avro's custom, boolean before numbers and long before double because fastavro takes the first that fits.
_ORDER = (type(None), bool, int, float, str, list, dict)


def merge_branches(kinds: list[Any]) -> Any:
    """One type for a union: a single branch stays itself; several kinds of text become one string.

    Raises:
        ValueError: two branches cannot be told apart; the message says which.
    """
    branches = [branch for index, branch in enumerate(_flat(kinds)) if branch not in list(_flat(kinds))[:index]]
    by_type: dict[type, list[Any]] = {}
    for branch in branches:
        by_type.setdefault(json_type(branch), []).append(branch)
    if object in by_type:
        return by_type[object][0]
    merged = [branch for kind in _ORDER for branch in _one_kind(kind, by_type.get(kind, []))]
    return merged[0] if len(merged) == 1 else merged


def _flat(kinds: list[Any]) -> Iterator[Any]:
    for kind in kinds:
        yield from kind if isinstance(kind, list) else [kind]


def _one_kind(kind: type, branches: list[Any]) -> list[Any]:
    if len(branches) < 2:
        return branches
    if kind is str:
        return ["string"]
    if kind is dict and all(kind_of(branch) == "record" for branch in branches) and literal_field(branches):
        return branches
    names = ", ".join(str(each.get("name", each["type"])) if isinstance(each, dict) else each for each in branches)
    raise ValueError(f"it may be {names}, and nothing in the data tells which")
