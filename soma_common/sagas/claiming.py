"""Which sagas a worker takes, and how many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from soma_common.sagas.fleet import Fleet
from soma_common.sagas.models import Saga
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.store import Claimed, SagaStore

_LOOKS: Final = 10  # in the time of a lease, for sagas whose owners fell silent


class Claimer:
    """Claims what there is room for.

    Args:
        sagas: definitions by the numbers of their types.
        fleet: what is under way.
        now: the monotonic clock.
    """

    def __init__(
        self, store: SagaStore, sagas: Mapping[int, Saga], settings: SagaSettings, fleet: Fleet,
        now: Callable[[], float],
    ) -> None:  # fmt: skip
        self._store, self._sagas, self._settings, self._fleet, self._now = store, sagas, settings, fleet, now
        self._looked, self._suspicious = 0.0, False

    @property
    def has_room(self) -> bool:
        """Claims come in batches: one per saga that ended would cost as much as its steps."""
        return len(self._fleet) <= self._settings.at_once * 3 // 4

    @property
    def _free(self) -> int:
        return self._settings.at_once - len(self._fleet)

    async def silent(self) -> list[Claimed]:
        """Sagas whose owners fell silent. They come before what is due, which may leave no room for as long as there is
        more of it than the workers can do."""
        now, settings = self._now(), self._settings
        if now - self._looked <= settings.lease / _LOOKS:
            return []
        self._looked, self._suspicious = now, True
        return await self._store.take_over(
            self._sagas, self._free, lease=settings.lease, patience=settings.patience
        )  # fmt: skip

    async def due(self) -> list[Claimed]:
        """Sagas that are due. Every type has an equal share of what is free."""
        rooms = self._rooms()
        if not rooms:
            return []
        share = -(-self._free // len(rooms))
        return await self._store.claim({t: min(share, room) for t, room in rooms.items()}, lease=self._settings.lease)

    def _rooms(self) -> dict[int, int]:
        """How many sagas of each type may be claimed."""
        free, limits = self._free, self._settings.of_type
        rooms = {}
        for type_id, saga in self._sagas.items():
            room = free
            if saga.name in limits:
                room = min(free, limits[saga.name] - self._fleet.count_of(saga))
            if room > 0:
                rooms[type_id] = room
        return rooms

    async def suspects(self) -> list[Claimed]:
        """One saga that was claimed again and again without progress. It may kill its worker, so it runs alone: none is
        taken while others are under way."""
        settings, looks = self._settings, self._suspicious
        self._suspicious = False  # until the next look for silent owners
        if not looks or not await self._store.any_suspects(self._sagas, settings.patience):
            return []
        if not await self._fleet.wait(settings.lease):
            return []  # others are busy, or too long at it: next time
        return await self._store.take_over(
            self._sagas, 1, lease=settings.lease, patience=settings.patience, suspects=True
        )
