"""What travels through Temporal: plain values, by its JSON converter. JSON of ours stays text, to the letter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from soma_common.errors import EventTooLarge
from soma_common.sagas.journal import Entry, What

MOST_MESSAGE: Final = 1_900_000
"""Bytes of one message; Temporal refuses those above 2 MiB."""
_SURELY_SMALL: Final = MOST_MESSAGE // 6  # characters; each is at most six bytes, as \\uXXXX


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a saga's workflow is started with. Only ``input`` must be there; other languages may start sagas with it.

    ``version``: None is the newest one that the worker has. ``fingerprint``: of the definition the caller means.
    The last four are of a saga that goes on in a new run, because its history has grown long.
    """

    input: Any = None
    version: int | None = None
    fingerprint: str | None = None
    saga_id: str | None = None
    tenant_id: str = "default"
    correlation_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    began: float | None = None
    journal: list[dict[str, Any]] = field(default_factory=list)
    signals: dict[str, list[str]] = field(default_factory=dict)
    asked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One thing that an activity is to do for a saga. ``results``: those that its function needs, by place."""

    saga: str
    version: int
    step: str
    attempt: int = 1
    undo: bool = False
    saga_id: str
    tenant_id: str
    correlation_id: str
    traceparent: str | None = None
    tracestate: str | None = None
    input: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    payload: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What it came to, as JSON; ``took``: seconds."""

    result: str | None
    took: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A failure, as an activity reports it. ``lost``: nobody answered; the worker may have died."""

    error_type: str
    error: str
    stack: str | None = None
    took: float | None = None
    unknown: bool = False
    final: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """What a person asks of a saga: who, why, and at which step (left out: the one it is stuck at)."""

    who: str
    why: str
    step: str = ""
    happened: bool | None = None
    result: Any = None


def plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON has it; what is None is left out."""
    fields = {name: value for name, value in asdict(entry).items() if value not in (None, "", 0)}
    if entry.result is not None:
        fields["result"] = entry.result.decode()
    return fields


def entry_of(fields: dict[str, Any]) -> Entry:
    """The entry that ``plain`` was given."""
    result = fields.get("result")
    return Entry(**fields | {"what": What(fields["what"]), "result": None if result is None else result.encode()})


def check_size(what: str, *texts: str | None) -> None:
    """Raise EventTooLarge when texts do not fit into one message."""
    given = [text for text in texts if text]
    if sum(map(len, given)) > _SURELY_SMALL and len(json.dumps(given)) > MOST_MESSAGE:
        raise EventTooLarge(
            f"{what} is too large for a message of Temporal.",
            cure=f"keep it below {MOST_MESSAGE} bytes, escaped; pass an address of what is large.",
        )
