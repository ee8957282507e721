"""Sagas as people see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from soma_common.dlq.filters import checked_text
from soma_common.errors import ValidationError
from soma_common.filtering import AllTenants, conditions_of, fill, narrowed
from soma_common.sagas.journal import What
from soma_common.sagas.models import SagaStatus

Row = Sequence[Any]
ACTIVE = (SagaStatus.PENDING, SagaStatus.RUNNING, SagaStatus.COMPENSATING, SagaStatus.STUCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEntry:
    """A line of a saga's journal. ``took``: seconds. ``due``: when the next attempt is made, or a wait ends.

    ``who`` and ``why`` are of what people did; ``stack`` of a failure for good.
    """

    number: int
    at: datetime
    step: str
    what: What
    attempt: int
    took: float | None
    due: datetime | None
    result: Any
    error_type: str | None
    error: str | None
    stack: str | None
    who: str | None
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaSummary:
    """A saga without its journal.

    ``reason``: the step because of which it turned or is stuck; or ``deadline``, ``compensate``, ``cancel``.
    ``wake_at``: when it is due, or the lease of its worker ends; None: it ended, or waits for people or a signal.
    ``has_worker``: a worker has it now. ``is_known``: some worker has had its version; else it waits for one.
    ``last_step`` and ``last_what``: of the last entry of its journal that is of a step.
    """

    saga_id: UUID
    name: str
    version: int
    tenant_id: str
    saga_key: str | None
    status: SagaStatus
    priority: int
    reason: str | None
    error_type: str | None
    error: str | None
    asked: str | None
    has_worker: bool
    is_known: bool
    wake_at: datetime | None
    deadline: datetime
    created_at: datetime
    ended_at: datetime | None
    correlation_id: str
    trace_id: str
    length: int
    last_step: str | None
    last_what: What | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaView(SagaSummary):
    """A saga with all that is known of it. ``input`` and ``result`` are JSON as Python's values."""

    input: Any
    result: Any
    journal: tuple[LoggedEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSaga:
    """A definition that workers have, or had. ``shape``: kinds and names of its parts. ``seen_at``: when one last
    registered it."""

    name: str
    version: int
    shape: Sequence[Any]
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class SagaPage:
    """Found sagas. ``next_cursor`` is what to pass for the next page, None at the end."""

    sagas: tuple[SagaSummary, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaFilter:
    """Which sagas to find; what is None does not filter. ``since`` (inclusive) and ``until`` are of the start.

    Raises:
        TenantRequired: without a tenant.
        ValidationError: a value that no saga can have.
    """

    tenant_id: str | AllTenants | None = None
    name: str | None = None
    statuses: Sequence[SagaStatus | str] | SagaStatus | str | None = None
    correlation_id: str | None = None
    saga_key: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        fill(self, _checked)

    @classmethod
    def of(cls, wanted: SagaFilter | None, conditions: Mapping[str, Any]) -> SagaFilter:
        """A filter, narrowed or changed by further conditions.

        Raises:
            ValidationError: a condition that does not exist.
        """
        return narrowed(cls, wanted, conditions, "Sagas")

    def conditions(self) -> dict[str, Any]:
        """The set conditions by name, with values as the database takes them."""
        return conditions_of(self)


def saga_id_of(value: UUID | str) -> UUID:
    """A saga's id.

    Raises:
        ValidationError: it is none.
    """
    try:
        return UUID(value) if isinstance(value, str) else UUID(int=value.int)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValidationError(f"saga id {value!r:.80} is not an id.", cure="give 32 hexadecimal digits.") from error


def summary_of(row: Row) -> SagaSummary:
    """From the columns of the block ``columns``."""
    return SagaSummary(**_columns(row))


def view_of(row: Row, entries: Sequence[Row]) -> SagaView:
    """From those of ``columns`` and ``content``, and of ``entries``."""
    given, result = row[len(_NAMES)], row[len(_NAMES) + 1]
    return SagaView(
        **_columns(row), input=_json(given), result=_json(result), journal=tuple(_entry(entry) for entry in entries)
    )


_NAMES = tuple(field.name for field in fields(SagaSummary))


def _columns(row: Row) -> dict[str, Any]:
    given = dict(zip(_NAMES, row, strict=False))
    what = given["last_what"]
    return given | {
        "saga_id": UUID(int=row[0].int), "status": SagaStatus(given["status"]), "last_what": what and What(what),
    }  # fmt: skip


def _entry(row: Row) -> LoggedEntry:
    return LoggedEntry(
        number=row[0], at=row[1], step=row[2], what=What(row[3]), attempt=row[4], took=row[5], due=row[6],
        result=_json(row[7]), error_type=row[8], error=row[9], stack=row[10], who=row[11], why=row[12],
    )  # fmt: skip


def _json(text: str | None) -> Any:
    return None if text is None else orjson.loads(text)


def _checked(name: str, value: Any) -> Any:
    if name == "statuses":
        try:
            return [SagaStatus(each).value for each in ([value] if isinstance(value, str) else value)]
        except (ValueError, TypeError) as error:
            raise ValidationError(f"{value!r:.80} is no status.", cure=f"use {', '.join(SagaStatus)}.") from error
    if name in ("since", "until"):
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValidationError(f"{name} {value!r:.80} has no time zone.", cure="use datetime.now(UTC) and the like.")
        return value
    return checked_text(name, value)
