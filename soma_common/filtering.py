"""What all filters share: a dataclass of conditions, of which those that are None do not filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

from soma_common.errors import TenantRequired, ValidationError


class AllTenants:
    """The type of ``ALL_TENANTS``."""

    def __repr__(self) -> str:
        return "ALL_TENANTS"


ALL_TENANTS: Final = AllTenants()

Filter = TypeVar("Filter", bound=Any)


def fill(chosen: Any, checked: Callable[[str, Any], Any]) -> None:
    """Replace the set conditions of a new filter by what ``checked(name, value)`` makes of them.

    Raises:
        TenantRequired: without a tenant.
    """
    if chosen.tenant_id is None or chosen.tenant_id == "":
        raise TenantRequired
    for name, value in conditions_of(chosen).items():
        object.__setattr__(chosen, name, checked(name, value))


def conditions_of(chosen: Any) -> dict[str, Any]:
    """The set conditions by name."""
    given = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    return {name: value for name, value in given.items() if value is not None and value is not ALL_TENANTS}


def narrowed(kind: type[Filter], wanted: Filter | None, conditions: Mapping[str, Any], what: str) -> Filter:
    """A filter, narrowed or changed by further conditions. ``what`` names what it finds.

    Raises:
        ValidationError: a condition that does not exist.
    """
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(conditions) - set(known))
    if unknown:
        raise ValidationError(f"{what} have no {unknown[0]!r:.80}.", cure=f"filter by {', '.join(known)}.")
    made: Filter = kind(**conditions) if wanted is None else replace(wanted, **conditions)
    return made
