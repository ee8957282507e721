"""The rebuilds of one consumer: begun with their tables, found again, and cleaned up after."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID, uuid4

from soma_common.errors import ReplayRefused, SomaError
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.pool import Pool, fetch
from soma_common.replay.checkpoints import Checkpoints
from soma_common.replay.models import Progress, ReplayFilter, ReplayMode, ReplayState, Scope
from soma_common.replay.projection import Projection, Shadow, check_obstacles, make_tables, shape_of
from soma_common.sql.loader import blocks

_OVER = (ReplayState.DONE, ReplayState.CANCELLED)


class Rebuilds:
    """Begins rebuilds, and cleans up after them."""

    def __init__(self, pool: Pool, checkpoints: Checkpoints) -> None:
        self._pool, self._checkpoints = pool, checkpoints

    async def open(
        self, scope: Scope, wanted: ReplayFilter, projection: Projection, *, rate: float | None, requested_by: str,
        reason: str, offsets: Sequence[tuple[str, int, int, int]] | None = None,
    ) -> UUID:  # fmt: skip
        """Make the new tables and record the run; its id.

        Args:
            offsets: of a run that reads Kafka (topic, partition, first offset, end) of what it begins with.

        Raises:
            ReplayRefused: a filter; another rebuild of the consumer is under way; tables that cannot be rebuilt.
        """
        if wanted != ReplayFilter(tenant_id=ALL_TENANTS):
            raise ReplayRefused(
                "A rebuild covers all events: of others the new tables would lack the effects.",
                cure="pass ReplayFilter(tenant_id=ALL_TENANTS) (--all-tenants), no more.",
            )
        await self._make_room(scope.consumer_id)
        run_id = uuid4()
        shadow = f"soma_rebuild_{run_id.hex[:12]}"
        live, tables, own = projection.schema, projection.tables, projection.create is not None
        try:
            async with self._pool.transaction() as tx:
                await check_obstacles(tx, live, tables, own_shape=own)
                shape = await shape_of(tx, live, tables)
                await make_tables(tx, projection, shadow)
                args = (
                    run_id, scope.consumer_id, "log" if offsets is None else "kafka", wanted.to_json(),
                    scope.end_tick, scope.end_token, scope.last_position, rate, requested_by, reason, live, shadow,
                    list(tables), own, shape,
                )  # fmt: skip
                await fetch(tx, _sql("open"), args)
                if offsets is not None:
                    columns = zip(*offsets, strict=True)
                    await fetch(tx, blocks("replays")["open_offsets"], (run_id, *map(list, columns)))
        except Exception as error:
            if isinstance(error, SomaError) or not is_from_driver(error):
                raise
            if getattr(error, "constraint_name", None) == "rebuilds_open_idx":
                raise ReplayRefused("Another rebuild of this consumer has begun.", cure="let it end.") from error
            raise ReplayRefused(f"The new tables cannot be made: {error}.", cure="see the message.") from error
        return run_id

    async def _make_room(self, consumer_id: int) -> None:
        for run_id, state in await self._pool.fetch(_sql("uncleaned"), consumer_id):
            if state not in _OVER:
                raise ReplayRefused(
                    f"Rebuild {run_id} of this consumer is {state}.", cure="let it end, resume it, or cancel it."
                )
            await self.clean(await self._checkpoints.find(run_id))

    async def shadow(self, run: Progress) -> Shadow:
        """What a rebuild fills."""
        return await Shadow.find(self._pool, run.run_id, run.inbox_id)

    async def clean(self, run: Progress) -> None:
        """Drop what a rebuild that is over has left: old tables (of a cancelled one the new ones) and inbox rows.

        Raises:
            ReplayRefused: the tables are still being read; call it again.
        """
        if run.mode is ReplayMode.REBUILD and run.state in _OVER:
            await (await self.shadow(run)).clean(self._pool)


def _sql(name: str) -> str:
    return blocks("rebuilds")[name]
