"""The rows of replays: a run's cursor moves in the transaction of its batch, under an epoch of one process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from soma_common.errors import LeaseLost, ReplayRefused, ValidationError
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.replay.models import Counts, Offset, Progress, ReplayFilter, ReplayMode, ReplayState, Scope
from soma_common.sql.loader import blocks

_MOST_ERROR: Final = 8192  # characters of a failure that are kept


class Checkpoints:
    """The runs of a database.

    ``lease``: seconds after which the run of a silent process may be taken by another. A paused process that wakes up
    later has lost its epoch: its batch is rolled back.
    """

    def __init__(self, pool: Pool, *, lease: float = 10.0) -> None:
        self._pool = pool
        self.lease = timedelta(seconds=lease)

    async def open(
        self, run_id: UUID, scope: Scope, wanted: ReplayFilter, *, mode: ReplayMode, rate: float | None,
        requested_by: str, reason: str, offsets: Sequence[tuple[str, int, int, int]] | None = None,
    ) -> None:  # fmt: skip
        """Record a run as planned.

        Args:
            offsets: of a run that reads Kafka (topic, partition, first offset, end) of what it covers.
        """
        async with self._pool.transaction(bound=SHORT) as tx:
            args = (
                run_id, scope.consumer_id, scope.consumer_id, mode.value, "log" if offsets is None else "kafka",
                wanted.to_json(), wanted.since, scope.end_tick, scope.end_token, scope.first_position,
                scope.last_position, rate, requested_by, reason,
            )  # fmt: skip
            await fetch(tx, _sql("open"), args)
            if offsets is not None:
                columns = zip(*offsets, strict=True)
                await fetch(tx, _sql("open_offsets"), (run_id, *map(list, columns)))

    async def find(self, run_id: UUID | str) -> Progress:
        """A run as it stands.

        Raises:
            ReplayRefused: there is no such run.
        """
        rows = await self._pool.fetch(_sql("columns") + "\n" + _sql("by_id"), _run_id(run_id))
        if not rows:
            raise ReplayRefused(
                f"There is no replay {run_id}.",
                cure="its id was printed when it began; `somastack events replays` lists all.",
            )
        return _progress(rows[0])

    async def newest(self, limit: int = 20, *, tenant: str | None = None) -> list[Progress]:
        """The latest runs, the newest first; of one tenant's events, or all."""
        given = (limit,) if tenant is None else (limit, tenant)
        order = "newest" if tenant is None else "newest_of_tenant"
        return [_progress(row) for row in await self._pool.fetch(f"{_sql('columns')}\n{_sql(order)}", *given)]

    async def claim(self, run_id: UUID | str, owner: UUID) -> Progress:
        """Take a run under a new epoch: one that nobody is at, or that this ``owner`` has already.

        Waits for a batch of it that is being committed, so the cursor is where it stands for certain.

        Raises:
            ReplayRefused: another process is at it, or it is paused, failed or over.
        """
        rows = await self._pool.fetch(_sql("claim"), _run_id(run_id), owner, self.lease)
        found = await self.find(run_id)
        if rows[0][0] is None:
            raise _refused(found)
        if found.epoch != rows[0][0]:
            raise LeaseLost(f"Another process took replay {run_id}.")
        return found

    async def renew(self, run: Progress) -> None:
        """Keep the run while nothing is saved.

        Raises:
            LeaseLost: it is not ours any more.
        """
        if not (await self._pool.fetch(_sql("renew"), run.run_id, run.epoch, self.lease))[0][0]:
            raise LeaseLost(f"Replay {run.run_id} is not this process's any more.")

    async def leave(self, run: Progress) -> None:
        """Let another process take the run at once."""
        await self._pool.fetch(_sql("renew"), run.run_id, run.epoch, timedelta())

    async def save(self, tx: Any, run: Progress, place: Cursor | Offset, counts: Counts) -> None:
        """Move the run's cursor in the transaction of its batch.

        Raises:
            LeaseLost: the run is not ours any more, or was paused or cancelled, or the inbox's horizon was raised above
                its beginning. The transaction must be rolled back.
        """
        added = (counts.read, counts.applied, counts.repeated, counts.skipped, counts.held)
        where: tuple[Any, ...]
        if isinstance(place, Offset):
            sql, where = _sql("save_offset"), place[:3]
        else:
            sql = _sql("save")
            where = (place.from_tick, place.from_token, place.to_tick, place.to_token, place.position)
        rows = await fetch(tx, sql, (run.run_id, run.epoch, self.lease, *where, *added))
        if not rows[0][0]:
            raise LeaseLost(f"Replay {run.run_id} was taken over, paused or cancelled.")

    async def turn(
        self, run_id: UUID | str, before: Sequence[ReplayState], to: ReplayState, *,
        epoch: int | None = None, error: str | None = None,
    ) -> bool:  # fmt: skip
        """Change a run's state if it is one of ``before`` (and under ``epoch``, if given); whether it was.

        When this returns True, no batch of an earlier state commits any more.
        """
        told = None if error is None else error.replace("\0", "")[:_MOST_ERROR]
        rows = await self._pool.fetch(_sql("turn"), _run_id(run_id), list(before), to.value, epoch, told)
        return bool(rows[0][0])

    async def raise_horizon(self, consumer_id: int, horizon: datetime) -> None:
        """Say that the inbox may have forgotten events with a timestamp before ``horizon``; it only moves forward.

        Call and commit this before deleting from the inbox.

        Raises:
            ValidationError: a time without a zone.
        """
        if not isinstance(horizon, datetime) or horizon.tzinfo is None:
            raise ValidationError(f"The horizon {horizon!r:.80} has no time zone.", cure="use datetime.now(UTC).")
        await self._pool.fetch(_sql("raise_horizon"), consumer_id, horizon)


def _refused(run: Progress) -> ReplayRefused:
    cures = {
        ReplayState.RUNNING: "wait until it ends, or pause it.",
        ReplayState.PAUSED: "resume it.",
        ReplayState.FAILED: "mend the handler or the event, then resume it.",
    }
    cure = cures.get(run.state, "start a new one.")
    told = f": {run.error}" if run.error else ""
    return ReplayRefused(f"Replay {run.run_id} is {run.state}{told}.", cure=cure)


def _run_id(value: UUID | str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValidationError(
            f"{value!r:.80} is not a replay's id.", cure="give a UUID: `somastack events replays` lists all."
        ) from error


def _progress(row: Row) -> Progress:
    (
        run_id, consumer, mode, source, wanted, state, consumer_id, inbox_id, epoch, end_tick, end_token, first, last,
        from_tick, from_token, to_tick, to_token, position, read, applied, repeated, skipped, held, *rest,
    ) = row  # fmt: skip
    rate, requested_by, reason, error, created_at, started_at, ended_at = rest
    return Progress(
        run_id=UUID(str(run_id)),
        consumer=consumer,
        mode=ReplayMode(mode),
        source=source,
        wanted=ReplayFilter.from_json(wanted),
        state=ReplayState(state),
        inbox_id=inbox_id,
        epoch=epoch,
        scope=Scope(
            consumer_id=consumer_id, end_tick=end_tick, end_token=end_token, first_position=first, last_position=last
        ),
        cursor=Cursor(from_tick, from_token, to_tick, to_token, position),
        counts=Counts(read=read, applied=applied, repeated=repeated, skipped=skipped, held=held),
        rate=rate,
        requested_by=requested_by,
        reason=reason,
        error=error,
        created_at=created_at,
        started_at=started_at,
        ended_at=ended_at,
    )


def _sql(name: str) -> str:
    return blocks("replays")[name]
