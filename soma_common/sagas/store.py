"""Sagas in the database: started, claimed, written. Every write of a worker is fenced by the epoch of its claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson

from soma_common.errors import SagaDefinitionError
from soma_common.events.ids import uuid7
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.sagas.journal import Entry, What
from soma_common.sagas.models import Saga, SagaStatus, shape
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext

_SQL: Final = blocks("sagas")
NORMAL: Final = 3
"""The priority of a saga that was given none; 1 is the most urgent, 5 the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A saga that is to begin."""

    saga: Saga
    input: bytes
    tenant_id: str
    correlation_id: str
    trace: TraceContext
    saga_key: str | None = None
    priority: int = NORMAL
    saga_id: UUID = field(default_factory=uuid7)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A saga that this worker has, under an epoch.

    ``doubtful``: its former owner fell silent, and may have been in the middle of a step. ``left``: seconds until its
    deadline. ``signals`` and ``asked``: what the worker has seen of what others want of it.
    """

    saga_id: UUID
    type_id: int
    tenant_id: str
    status: SagaStatus
    length: int
    epoch: int
    claims: int
    doubtful: bool
    signals: int
    asked: str | None
    left: float
    input: bytes
    correlation_id: str
    trace: TraceContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is written of a saga in one statement: entries, and how it goes on.

    ``known``: entries that its journal has as the worker knows it; a journal with less was set back. ``kept``: the
    worker goes on with it; else it is given back, and due in ``wake_in`` seconds (None: never by itself). ``turns``: it
    turns around or is stuck, because of ``reason``.
    """

    saga: Claimed
    known: int
    entries: Sequence[Entry] = ()
    status: SagaStatus | None = None
    kept: bool = True
    wake_in: float | None = None
    result: bytes | None = None
    turns: bool = False
    reason: str | None = None
    error_type: str | None = None
    error: str | None = None


class Seen(NamedTuple):
    """What others want of a saga; and how long its journal was before what was just written."""

    asked: str | None
    signals: int
    base: int = 0


class SagaStore:
    """The tables of sagas, as one worker sees them.

    Args:
        pool: connections to the database.
        owner: names the worker; a new one for each.
    """

    def __init__(self, pool: Pool, owner: UUID | None = None) -> None:
        self.pool, self.owner = pool, owner or uuid7()

    async def register(self, saga: Saga) -> str | None:
        """Make a definition known. None, or how it was first seen under this version, where that was another shape.

        Raises:
            SagaDefinitionError: its name and version make the same number as those of another saga.
        """
        mine = orjson.dumps(shape(saga.parts)).decode()
        arguments = (saga.type_id, saga.name, saga.version, saga.fingerprint, mine, saga.pivots)
        await self.pool.fetch(_SQL["register"], *arguments)
        fingerprint, first, name = (await self.pool.fetch(_SQL["seen"], saga.type_id))[0]
        if name != saga.name:
            raise SagaDefinitionError(
                f"Saga {saga.name} cannot be told apart from saga {name} in the database.", cure="rename it."
            )
        return None if fingerprint == saga.fingerprint else str(first)

    async def claim(self, rooms: Mapping[int, int], *, lease: float) -> list[Claimed]:
        """Take sagas that are due, of each type as many as there is room for."""
        arguments = (self.owner, list(rooms), list(rooms.values()), lease)
        return [_claimed(row) for row in await self.pool.fetch(_SQL["claim"], *arguments)]

    async def take_over(
        self, types: Iterable[int], room: int, *, lease: float, patience: int, suspects: bool = False
    ) -> list[Claimed]:
        """Take sagas whose owners fell silent."""
        arguments = (self.owner, list(types), room, lease, patience, suspects)
        return [_claimed(row) for row in await self.pool.fetch(_SQL["take_over"], *arguments)]

    async def take_again(self, saga: Claimed, *, lease: float) -> Claimed | None:
        """The saga under a new epoch, as it stands now; None when another worker has it."""
        rows = await self.pool.fetch(_SQL["take_again"], saga.saga_id, saga.epoch, self.owner, lease)
        return _claimed(rows[0]) if rows else None

    async def journals(self, sagas: Iterable[UUID]) -> dict[UUID, list[Entry]]:
        """The entries of sagas, in order. ``due_in`` counts from now."""
        found: dict[UUID, list[Entry]] = {}
        for row in await self.pool.fetch(_SQL["journal"], list(sagas)):
            entry = Entry(
                what=What(row[2]), step=row[1], attempt=row[3], result=_bytes(row[4]), error_type=row[5], error=row[6],
                due_in=row[7],
            )  # fmt: skip
            found.setdefault(UUID(int=row[0].int), []).append(entry)
        return found

    async def hold(self, sagas: Sequence[Claimed], *, lease: float) -> dict[UUID, Seen | None]:
        """Renew leases. A saga that is missing was lost; one with None is just being written, and held on."""
        ids, epochs = [saga.saga_id for saga in sagas], [saga.epoch for saga in sagas]
        rows = await self.pool.fetch(_SQL["hold"], ids, epochs, self.owner, lease)
        found: dict[UUID, Seen | None] = {UUID(int=row[0].int): Seen(row[1], row[2]) for row in rows}
        if len(found) < len(sagas):
            for row in await self.pool.fetch(_SQL["held"], ids, epochs, self.owner):
                found.setdefault(UUID(int=row[0].int), None)
        return found

    async def leave(self) -> None:
        """What this worker still has may be taken over at once."""
        await self.pool.fetch(_SQL["leave"], self.owner)

    async def any_suspects(self, types: Iterable[int], patience: int) -> bool:
        """Whether sagas of these types were claimed so often without progress, and wait to be claimed again."""
        return bool((await self.pool.fetch(_SQL["suspects"], list(types), patience))[0][0])

    async def next_signal(self, saga: UUID, name: str) -> tuple[str, bytes] | None:
        """The first signal of a name that was not taken: its id and payload."""
        rows = await self.pool.fetch(_SQL["next_signal"], saga, name)
        return (rows[0][0], rows[0][1].encode()) if rows else None

    async def take_signal(self, saga: UUID, signal: str, entry: int, tx: Any) -> None:
        """An entry of the journal took it; 0: it was refused."""
        await fetch(tx, _SQL["take_signal"], (saga, signal, entry))

    async def record(self, records: Sequence[Record], tx: Any | None = None) -> dict[int, Seen]:
        """Write records, in the caller's transaction if there is one. By the places of those that were not lost."""
        name, arguments = _recording(records, self.owner)
        if tx is None:
            rows = await self.pool.fetch(_SQL[name], *arguments)
        else:
            rows = await fetch(tx, _SQL[name], arguments)
        return {row[0] - 1: Seen(row[1], row[2], row[3]) for row in rows}


async def start(connection: Any, starts: Sequence[Start]) -> list[UUID]:
    """Begin sagas on a connection; the ids of those that did not exist under their keys."""
    rows = await fetch(connection, _SQL["start"], start_arguments(starts))
    return [UUID(int=row[0].int) for row in rows]


def start_arguments(starts: Sequence[Start]) -> list[Any]:
    """The arguments of the statement that begins sagas, for any driver."""
    columns = zip(
        *(
            (
                each.saga_id, each.saga.type_id, each.saga.name, each.saga.version, each.tenant_id, each.saga_key,
                each.priority, each.saga.deadline, each.input.decode(), each.correlation_id, each.trace.traceparent,
                each.trace.tracestate,
            )
            for each in starts
        ),
        strict=True,
    )  # fmt: skip
    return [list(column) for column in columns]


def _claimed(row: Row) -> Claimed:
    return Claimed(
        UUID(int=row[0].int), row[1], row[2], SagaStatus(row[3]), row[4], row[5], row[6], row[7], row[8], row[9],
        row[10], row[11].encode(), row[12], TraceContext.recorded(row[13], row[14]),
    )  # fmt: skip


def _recording(records: Sequence[Record], owner: UUID) -> tuple[str, Sequence[Any]]:
    """The block that writes records, and its arguments. One saga with one entry is the usual case of a transactional
    step: scalars cost half of what lists of one do."""
    entries = records[0].entries
    follows = entries[1] if len(entries) == 2 else None
    if len(records) > 1 or not 1 <= len(entries) <= 2 or (follows is not None and (follows.step or follows.error)):
        columns = [list(column) for column in zip(*map(_saga_row, records), strict=True)]
        columns.insert(3, [len(each.entries) for each in records])
        return "record", (*columns, owner, *_entry_columns(records))
    following = (None, None) if follows is None else (follows.why, follows.what)
    return "record_one", (*_saga_row(records[0]), owner, *_entry_row(entries[0]), *following)


def _saga_row(each: Record) -> tuple[Any, ...]:
    saga = each.saga
    return (
        saga.saga_id, saga.epoch, each.known, each.status, each.kept, each.wake_in, saga.signals, saga.asked,
        _text(each.result), each.turns, each.reason, each.error_type, each.error,
    )  # fmt: skip


def _entry_row(entry: Entry) -> tuple[Any, ...]:
    return (
        entry.step, entry.what, entry.attempt, entry.due_in, entry.took, _text(entry.result), entry.error_type,
        entry.error, entry.stack, entry.why,
    )  # fmt: skip


def _entry_columns(records: Sequence[Record]) -> list[list[Any]]:
    rows = [
        (ordinal, place, *_entry_row(entry))
        for ordinal, record in enumerate(records, 1)
        for place, entry in enumerate(record.entries, 1)
    ]
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(12)]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else value.encode()
