"""The inbox: remembers, in the transaction of the effects, which events a consumer has applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

Key = tuple[Any, str, str]


@dataclass(frozen=True, slots=True)
class Inbox:
    """The inbox of one consumer.

    An event is known by (consumer, tenant, service, idempotency key). Events without a key of their own are known by
    their UUIDv7, so that old rows can go by time; the others are kept beside them.

    ``idle_timeout`` (seconds): PostgreSQL ends a batch's transaction whose client was silent for so long, because a
    paused process would otherwise keep its inbox rows locked and the new owner of its partitions waiting.
    """

    consumer_id: int
    idle_timeout: float = 30.0

    async def claim(self, tx: Any, events: Sequence[RecordedEvent]) -> list[bool]:
        """Enter the events; for each, whether it is new. The second of two equal events of one call is not.

        Also makes the transaction's commit wait for the disk.
        """
        ids, keys = self._distinct(events)
        fresh: dict[int, bool] = {}
        for block, wanted in (("claim_ids", ids), ("claim_keys", keys)):
            if wanted:
                fresh |= await self._enter(tx, block, wanted)
        return [place in fresh for place in range(len(events))]

    def _distinct(self, events: Sequence[RecordedEvent]) -> tuple[dict[Key, int], dict[Key, int]]:
        """The places where each id and each given key comes first."""
        ids: dict[Key, int] = {}
        keys: dict[Key, int] = {}
        for place, event in enumerate(events):
            if event.event_id.version == 7 and event.idempotency_key == str(event.event_id):
                ids.setdefault((event.event_id, event.tenant_id, event.service_id), place)
            else:
                keys.setdefault((event.idempotency_key, event.tenant_id, event.service_id), place)
        return ids, keys

    async def _enter(self, tx: Any, block: str, wanted: dict[Key, int]) -> dict[int, bool]:
        timeout = f"{int(self.idle_timeout * 1000)}ms"
        columns = [list(column) for column in zip(*wanted, strict=True)]
        rows = await fetch(tx, blocks("consumer")[block], (self.consumer_id, timeout, *columns))
        if len(rows) == len(wanted):
            return dict.fromkeys(wanted.values(), True)
        return {wanted[(row[0], row[1], row[2])]: True for row in rows}


async def consumer_id(pool: Pool, name: str) -> int:
    """The number of a consumer, made when it is first seen."""
    known = await pool.fetch(blocks("consumer")["find"], name)
    if not known:
        known = await pool.fetch(blocks("consumer")["register"], name)
    return int(known[0][0])
