"""The swap of a rebuild: one transaction, in which the live consumer stands still and nothing is left between the two.

It holds the consumer's lock exclusively: every batch, letter and re-drive holds it shared from its claim to its commit.
When it is granted, all that the consumer applied has committed, and the next batch waits. Then what the consumer has
settled and the new tables lack is applied, the tables change places, and the run's inbox becomes the consumer's.
A try that takes too long is rolled back, so that live traffic never waits for longer than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from soma_common.consumer.effects import Blamed
from soma_common.consumer.lanes import Lane
from soma_common.consumer.pipeline import Begin
from soma_common.consumer.source import Record
from soma_common.errors import LeaseLost, ReplayRefused, SomaError, TransactionConflict
from soma_common.inbox import NO_LANE
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.pool import fetch
from soma_common.replay.applying import failed, sequence_of
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.filling import Filling
from soma_common.replay.mirror import MOST_FREED, mirrored
from soma_common.replay.models import Counts, Progress
from soma_common.replay.past import Past, Rest, TooMuch, known
from soma_common.replay.projection import Shadow, is_locked, took_too_long
from soma_common.sql.loader import blocks


class NotNow(Exception):
    """A swap was given up; nothing happened. The message says why."""


class Swap:
    """Tries to put a run's tables in the place of the live ones.

    Args:
        begin: how a transaction begins that handlers work in.
        within: most seconds that one try may hold live traffic up.
        most: most events that are applied in it.
    """

    def __init__(
        self, begin: Begin, checkpoints: Checkpoints, past: Past, filling: Filling, shadow: Shadow, *,
        within: float, most: int,
    ) -> None:  # fmt: skip
        self._begin, self._checkpoints, self._past = begin, checkpoints, past
        self._filling, self._shadow = filling, shadow
        self._within, self._most = within, most

    async def attempt(self, run: Progress, patience: float) -> None:
        """Swap, or give up. When this returns, it has committed.

        Args:
            patience: seconds to wait for batches in flight, and for readers of the old tables.

        Raises:
            NotNow: it took too long, or too much was left.
            HandlerFailed: an event failed.
            ReplayRefused: the tables cannot be swapped any more, or a forced replay is under way.
            LeaseLost: the run is not ours any more.
            InfrastructureError: it is unknown whether it took effect.
        """
        try:
            async with asyncio.timeout(patience + self._within):
                await self._transaction(run, patience)
        except TimeoutError as error:
            raise NotNow(f"it took longer than {patience + self._within:.1f} s") from error
        except TooMuch as error:
            raise NotNow(f"more than {self._most} events were left") from error
        except TransactionConflict as error:
            raise NotNow(f"it met another transaction: {error.message}") from error
        except Exception as error:
            if is_locked(error):
                raise NotNow(f"what is in use was not free within {patience:.2f} s") from error
            if took_too_long(error):
                raise NotNow("PostgreSQL ended it") from error
            if isinstance(error, SomaError) or not is_from_driver(error):
                raise
            raise ReplayRefused(
                f"The new tables cannot take the place of the old ones: {error}.",
                cure="mend what PostgreSQL names and resume the rebuild; or cancel it and start again.",
            ) from error

    async def _transaction(self, run: Progress, patience: float) -> None:
        async with self._begin() as tx:
            bounds = [f"{max(1, int(1000 * each))}ms" for each in (patience, self._within, patience + self._within + 1)]
            if not (await fetch(tx, _sql("begin_swap"), (run.run_id, run.epoch, *bounds)))[0][0]:
                raise LeaseLost(f"Replay {run.run_id} was taken over, paused or cancelled.")
            await self._check_forced(tx, run)
            await self._checkpoints.save(tx, run, run.cursor, await self._catch_up(tx, run))
            await self._shadow.lock(tx)  # before the check: what somebody is just making is waited for, and then seen
            await self._shadow.check(tx)
            await self._shadow.detach(tx)
            await fetch(tx, _sql("swap_tables"), (run.run_id,))
            if not (await fetch(tx, _sql("adopt_inbox"), (run.run_id, run.epoch)))[0][0]:
                raise LeaseLost(f"Replay {run.run_id} was taken over, paused or cancelled.")

    async def _check_forced(self, tx: Any, run: Progress) -> None:
        rows = await fetch(tx, _sql("forced"), (run.scope.consumer_id,))
        if rows:
            raise ReplayRefused(
                f"The forced replay {rows[0][0]} of {run.consumer} is not over: the new tables would lack its effects.",
                cure="let it end or cancel it, then resume the rebuild.",
            )

    async def _catch_up(self, tx: Any, run: Progress) -> Counts:
        """What the consumer has settled behind the pages. What it has not, is its own to apply after the swap."""
        rest = await self._past.rest(tx, self._most)
        records = await _settled(tx, run, rest)
        freed, items = await mirrored(tx, run, records, self._past.decode)
        if len(freed) == MOST_FREED:
            raise TooMuch
        everything = [*freed, *items]
        if not everything:
            return Counts()
        try:
            lane = Lane(NO_LANE, 1, sequence_of)
            return await self._filling.inside(tx, lane, everything, silence=self._within)
        except Blamed as blamed:
            if blamed.place is None:
                raise NotNow(f"an event failed: {blamed.cause}") from blamed.cause
            raise failed(everything[blamed.place].record, blamed.cause) from blamed.cause


async def _settled(tx: Any, run: Progress, rest: Sequence[Rest]) -> list[Record]:
    """Those that a stored position has passed, or that the inbox knows; of what cannot be decoded a letter may tell."""
    open_ = [record.event for record, passed in rest if not passed and record.event is not None]
    ids = await known(tx, run.scope.consumer_id, open_)
    return [record for record, passed in rest if passed or record.event is None or record.event.event_id in ids]


def _sql(name: str) -> str:
    return blocks("rebuilds")[name]
