"""Notes in the database that are made before events are begun: who finds one knows that its writer died with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from soma_common.consumer.source import Partition, Place
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_SQL = blocks("consumer")


class Attempts:
    """Counts how often partitions are taken without moving, and events begun without ending.

    Args:
        begun: what this process has begun and not ended, over its sessions.
    """

    def __init__(self, pool: Pool, consumer_id: int, begun: set[Place]) -> None:
        self._pool, self._consumer_id, self._begun = pool, consumer_id, begun

    async def take(self, partitions: Collection[Partition]) -> Mapping[Partition, int]:
        """Count that they are taken; how often that was since they moved."""
        rows = await self._pool.fetch(_SQL["take_partitions"], self._consumer_id, *_columns(partitions))
        return {Partition(name, number): claims for name, number, claims in rows}

    async def left(self, partitions: Collection[Partition]) -> Mapping[Place, int]:
        """Events that others had begun when they died: how often each was begun alone."""
        rows = await self._pool.fetch(_SQL["attempts_left"], self._consumer_id, *_columns(partitions))
        found = {(Partition(name, number), offset): attempts for name, number, offset, attempts in rows}
        ours = {place: attempts - (place in self._begun) for place, attempts in found.items()}
        return {place: attempts for place, attempts in ours.items() if attempts >= 0}

    async def begin(self, places: Sequence[Place]) -> None:
        """Before several events are begun together."""
        async with self._pool.transaction(bound=SHORT) as tx:
            await fetch(tx, _SQL["begin_together"], (self._consumer_id, *_places(places)))
        self._begun.update(places)

    async def begin_alone(self, place: Place) -> int:
        """Before an event is begun alone: the how manieth time this is."""
        if place in self._begun:  # by ourselves, and we live
            return 0
        async with self._pool.transaction(bound=SHORT) as tx:
            rows = await fetch(tx, _SQL["begin_alone"], (self._consumer_id, *place[0], place[1]))
        self._begun.add(place)
        return int(rows[0][0])

    async def end(self, places: Iterable[Place]) -> None:
        """They ended, well or not; whose note was withdrawn meanwhile keeps what others noted."""
        ended = [place for place in places if place in self._begun]
        if ended:
            await self._pool.fetch(_SQL["end_attempts"], self._consumer_id, *_places(ended))
            self._begun.difference_update(ended)

    async def withdraw(self, tx: object, partitions: Collection[Partition]) -> None:
        """Their owner leaves alive."""
        ours = [place for place in self._begun if place[0] in partitions]
        if ours:
            await fetch(tx, _SQL["withdraw_attempts"], (self._consumer_id, *_places(ours)))
            self._begun.difference_update(ours)

    async def moved(self, tx: object, places: Sequence[Place]) -> None:
        """Partitions move to these places, or their owner leaves in good order: their count begins anew."""
        await fetch(tx, _SQL["partitions_moved"], (self._consumer_id, *_places(places)))


def _columns(partitions: Collection[Partition]) -> tuple[list[Any], ...]:
    return [partition.name for partition in partitions], [partition.number for partition in partitions]


def _places(places: Sequence[Place]) -> tuple[list[Any], ...]:
    return *_columns([partition for partition, _ in places]), [offset for _, offset in places]
