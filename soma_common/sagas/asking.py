"""What people and programs ask of sagas, as statements and what the answers mean. No I/O: for every kind of driver."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar
from uuid import UUID

import orjson

from soma_common.dlq.failures import storable
from soma_common.dlq.filters import where
from soma_common.errors import SagaKeyReused, SagaNotFound, TransactionConflict, ValidationError, WrongSagaState
from soma_common.events.ids import uuid7
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.store import Start, start_arguments
from soma_common.sagas.values import encode_any
from soma_common.sagas.views import (
    KnownSaga,
    Row,
    SagaFilter,
    SagaPage,
    SagaView,
    saga_id_of,
    summary_of,
    view_of,
)
from soma_common.sql.loader import blocks

Answer = TypeVar("Answer")
Statement = tuple[str, Sequence[Any]]
Asking = Generator[Statement, Sequence[Row], Answer]

_SQL: Final = blocks("sagas")
MOST_LISTED: Final = 1000
FORGOTTEN_AT_ONCE: Final = 500
_SUMMARIES: Final = "\n".join([_SQL["columns"], _SQL["source"]])
_VIEW: Final = "\n".join([_SQL["columns"], _SQL["content"], _SQL["source"], _SQL["by_id"]])
_ENDED: Final = (SagaStatus.COMPLETED, SagaStatus.COMPENSATED)


class Dialogue(Generic[Answer]):
    """A question that is being asked: whoever has a connection carries ``statement`` out and hands its rows over.

    Attributes:
        statement: the next one; None: the question is answered.
        answer: what it came to, then.
    """

    answer: Answer

    def __init__(self, question: Asking[Answer]) -> None:
        self._question = question
        self.statement: Statement | None = next(question)

    def hand_over(self, rows: Sequence[Row]) -> None:
        """The rows of the statement."""
        try:
            self.statement = self._question.send(rows)
        except StopIteration as end:
            self.statement, self.answer = None, end.value


def start(starts: Sequence[Start]) -> Asking[list[UUID]]:
    """Begin sagas; those that were started under their keys before are not started again.

    Raises:
        SagaKeyReused: one was started with another input.
    """
    rows = yield _SQL["start"], start_arguments(starts)
    made = {UUID(int=row[0].int) for row in rows}
    known = [each for each in starts if each.saga_id not in made]
    if not known:
        return [each.saga_id for each in starts]
    found = {row[0]: row for row in (yield _SQL["by_keys"], _keys(known))}
    ids = {each.saga_id: each.saga_id for each in starts}
    for ordinal, each in enumerate(known, 1):
        if ordinal not in found:
            raise TransactionConflict(
                f"Saga {each.saga.name} with key {each.saga_key!r} is just being started by somebody else.",
                cure="run the whole transaction again.",
            )
        _, saga_id, given = found[ordinal]
        if orjson.loads(given) != orjson.loads(each.input):
            raise SagaKeyReused(
                f"Saga {each.saga.name} was started under the key {each.saga_key!r} with another input.",
                cure="use another key, or the same input.",
            )
        ids[each.saga_id] = UUID(int=saga_id.int)
    return [ids[each.saga_id] for each in starts]


def _keys(starts: Sequence[Start]) -> list[list[Any]]:
    return [[s.tenant_id for s in starts], [s.saga.name for s in starts], [s.saga_key for s in starts]]


def show(saga_id: UUID | str) -> Asking[SagaView]:
    """One saga with its journal."""
    given = saga_id_of(saga_id)
    rows = yield _VIEW, (given,)
    if not rows:
        raise not_found(given)
    entries = yield _SQL["entries"], (given,)
    view = view_of(rows[0], entries)
    return replace(view, journal=view.journal[: view.length])  # what was written since is not in its status


def find(wanted: SagaFilter, cursor: str | None, limit: int) -> Asking[SagaPage]:
    """A page of sagas, the newest first."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_LISTED:
        raise ValidationError(f"limit is {limit!r:.80}.", cure=f"use 1 to {MOST_LISTED}.")
    conditions = wanted.conditions() | ({} if cursor is None else {"before": saga_id_of(cursor)})
    clause, args = where(conditions, "sagas")
    order = _SQL["newest_first"].replace("$n", f"${len(args) + 1}")
    rows = yield f"{_SUMMARIES}\n{clause}{order}", [*args, limit + 1]
    sagas = tuple(summary_of(row) for row in rows[:limit])
    return SagaPage(sagas, str(sagas[-1].saga_id) if len(rows) > limit else None)


def known() -> Asking[list[KnownSaga]]:
    """The definitions that workers have, or had."""
    rows = yield _SQL["known"], ()
    return [KnownSaga(name=row[0], version=row[1], shape=orjson.loads(row[2]), seen_at=row[3]) for row in rows]


def signal(
    saga_id: UUID | str, name: str, payload: Any, *, signal_id: str | None, who: str | None
) -> Asking[bool]:  # fmt: skip
    """Leave a signal; False when the same one came before.

    Raises:
        SagaNotFound, WrongSagaState: there is no such saga, or it ended.
    """
    given, text = saga_id_of(saga_id), encode_any(payload, f"Signal {name!s:.80}")
    known = signal_id if signal_id is not None else str(uuid7())
    for what, value in (("A signal's name", name), ("signal_id", known)):
        if not isinstance(value, str) or not 0 < len(value) <= 512 or storable(value, 2048) != value:
            raise ValidationError(f"{what} is {value!r:.80}.", cure="use a text of 1 to 512 characters.")
    by = None if who is None else storable(who, 512)
    rows = yield _SQL["signal"], (given, known, name, text.decode(), by)
    if not rows:
        raise not_found(given)
    status, fresh, version = rows[0]
    if version == 0:
        raise WrongSagaState(f"Saga {given} is a choreography: it waits for no signal.", cure="publish an event.")
    if status in _ENDED:
        raise WrongSagaState(f"Saga {given} is {status}: it takes no signal any more.")
    return bool(fresh)


def ask(saga_id: UUID | str, what: str, *, who: str, why: str) -> Asking[bool]:
    """Ask a saga to turn around; False when that was asked before.

    Raises:
        SagaNotFound, WrongSagaState: there is no such saga, or there is no way back any more; or nobody conducts it.
    """
    given = saga_id_of(saga_id)
    rows = yield _SQL["ask"], (given, what, storable(who, 512), _reason(why))
    status, name = rows[0] if rows else (None, None)
    if status is None:
        raise not_found(given)
    if status == "choreography":
        raise WrongSagaState(
            f"Saga {given} ({name}) is a choreography: nobody conducts it.",
            cure="publish the event that Choreography.turn(...) makes.",
        )
    if status == "pivot":
        raise WrongSagaState(f"Saga {given} is behind its pivot: there is no way back.", cure="let it go on.")
    if status in (*_ENDED, SagaStatus.COMPENSATING, "turned"):
        told = "it turned around already" if status == "turned" else f"it is {status}"
        raise WrongSagaState(f"Saga {given} cannot turn around: {told}.")
    return bool(status != "asked")


def unstick(saga_id: UUID | str, verb: str, result: bytes | None, *, who: str, why: str) -> Asking[None]:
    """Let a stuck saga go on: ``retry``, ``skip``, ``done`` or ``failed``.

    Raises:
        SagaNotFound, WrongSagaState: there is no such saga, or it is not stuck, or not so.
    """
    given = saga_id_of(saga_id)
    text = None if result is None else result.decode()
    status = (yield _SQL["unstick"], (given, verb, text, storable(who, 512), _reason(why)))[0][0]
    if status is None:
        raise not_found(given)
    if status == "no-step":
        raise WrongSagaState(f"Saga {given} is not stuck at a step.", cure="retry or compensate it.")
    if status == "turned":
        raise WrongSagaState(f"Saga {given} is being undone.", cure="say that it is undone, or skip it.")
    if status != SagaStatus.STUCK:
        raise WrongSagaState(f"Saga {given} is {status}, not stuck.")


def ended_before(moment: datetime) -> Asking[int]:
    """How many sagas ended before a moment.

    Raises:
        ValidationError: it has not come yet, or it has no offset.
    """
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValidationError(f"ended_before is {moment!r:.80}.", cure="use a datetime with an offset.")
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        raise ValidationError(
            f"ended_before is {moment!s:.80}, which UTC does not have.", cure="use another."
        ) from None
    count, is_ahead = (yield _SQL["ended_before"], (moment,))[0]
    if is_ahead:
        raise ValidationError(f"{moment.isoformat()} has not come yet.", cure="use a moment in the past.")
    return int(count)


def forget(moment: datetime) -> Asking[int]:
    """Remove the oldest sagas that ended before a moment, with all that belongs to them; how many."""
    return int((yield _SQL["forget"], (moment, FORGOTTEN_AT_ONCE))[0][0])


class Standing(NamedTuple):
    """Where a saga stands."""

    status: SagaStatus
    reason: str | None
    name: str
    version: int
    turned: bool


def standing(saga_id: UUID | str) -> Asking[Standing]:
    """Where a saga stands."""
    given = saga_id_of(saga_id)
    rows = yield _SQL["status"], (given,)
    if not rows:
        raise not_found(given)
    return Standing(SagaStatus(rows[0][0]), *rows[0][1:])


def not_found(saga_id: UUID) -> SagaNotFound:
    """There is no such saga."""
    return SagaNotFound(f"There is no saga {saga_id}.", cure="see `somastack saga list --all-tenants`.")


def _reason(why: str) -> str:
    if not isinstance(why, str) or not why.strip():
        raise ValidationError("What people do to sagas has a reason.", cure="say why.")
    return storable(why, 2000)
