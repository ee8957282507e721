"""Which dead letters to find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from soma_common.dlq.models import Status
from soma_common.errors import ValidationError
from soma_common.filtering import AllTenants, conditions_of, fill, narrowed
from soma_common.sql.loader import blocks

_IDS = ("event_id", "trace_id")
_MOMENTS = ("since", "until")


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterFilter:
    """Which letters to find; what is None does not filter. ``since`` (inclusive) and ``until`` (exclusive) are of the
    parking. A letter that could not be decoded belongs to no tenant: only ALL_TENANTS finds it.

    Raises:
        TenantRequired: without a tenant.
        ValidationError: a value that no letter can have.
    """

    tenant_id: str | AllTenants | None = None
    consumer: str | None = None
    statuses: Sequence[Status | str] | Status | str | None = None
    stage: str | None = None
    fingerprint: str | None = None
    event_type: str | None = None
    event_id: UUID | str | None = None
    trace_id: UUID | str | None = None
    error_type: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        fill(self, _checked)

    @classmethod
    def of(cls, wanted: LetterFilter | None, conditions: Mapping[str, Any]) -> LetterFilter:
        """A filter, narrowed or changed by further conditions.

        Raises:
            ValidationError: a condition that does not exist.
        """
        return narrowed(cls, wanted, conditions, "Letters")

    def conditions(self) -> dict[str, Any]:
        """The set conditions by name, with values as the database takes them."""
        return conditions_of(self)


def where(conditions: Mapping[str, Any], file: str = "dead_letters") -> tuple[str, list[Any]]:
    """A WHERE clause of a file's named fragments and its parameters, from $1 on; values are always parameters."""
    sql = blocks(file)
    parts = [sql[f"where_{name}"].replace("$n", f"${number}") for number, name in enumerate(conditions, 1)]
    return (f"WHERE {' AND '.join(parts)}\n" if parts else ""), list(conditions.values())


def cursor_of(cursor: str | None) -> int | None:
    """The place that a page's ``next_cursor`` stands for.

    Raises:
        ValidationError: it is none.
    """
    if cursor is None:
        return None
    if not isinstance(cursor, str) or not (cursor.isascii() and cursor.isdigit()) or len(cursor) > 18:
        raise ValidationError(f"cursor is {cursor!r:.80}.", cure="pass the next_cursor of the page before.")
    return int(cursor)


def letter_id_of(value: UUID | str) -> UUID:
    """A letter's id.

    Raises:
        ValidationError: it is none.
    """
    return _uuid("letter id", value)


def _checked(name: str, value: Any) -> Any:
    if name == "statuses":
        return _statuses(value)
    if name in _IDS:
        return _uuid(name, value)
    if name in _MOMENTS:
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValidationError(f"{name} {value!r:.80} has no time zone.", cure="use datetime.now(UTC) and the like.")
        return value
    return checked_text(name, value)


def checked_text(name: str, value: Any) -> str:
    """A text that PostgreSQL takes.

    Raises:
        ValidationError: it is no text, or holds a NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise ValidationError(f"{name} is a {type(value).__name__}, not text.", cure=f"pass {name} as text.")
    if "\0" in value or value.encode("utf-8", "replace").decode() != value:
        raise ValidationError(f"{name} {value!r:.80} holds a NUL or a lone surrogate.", cure="remove it.")
    return value


def _statuses(value: Any) -> list[str]:
    try:
        return [Status(each).value for each in ([value] if isinstance(value, str) else value)]
    except (ValueError, TypeError) as error:
        raise ValidationError(f"{value!r:.80} is no status.", cure=f"use {', '.join(Status)}.") from error


def _uuid(name: str, value: UUID | str) -> UUID:
    try:
        return UUID(value) if isinstance(value, str) else UUID(int=value.int)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValidationError(f"{name} {value!r:.80} is not an id.", cure="give 32 hexadecimal digits.") from error
