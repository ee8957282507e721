"""What a pump has seen acknowledged while its cursors could not be saved."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from soma_common.outbox.groups import Group
from soma_common.outbox.pump import Pump
from soma_common.postgres.cursor import Cursor

SAVED, SEEN = Cursor(1, 1), Cursor(5, 5)


class Ticks:
    """A history that knows every cursor."""

    async def latest(self) -> None:
        pass

    async def next_diff(self, cursor: Cursor, latest: None) -> None:
        pass


def pump() -> Pump:
    """A pump that has seen more under epoch 3 than it could save."""
    made = Pump.__new__(Pump)
    made._p = SimpleNamespace(ticks=Ticks())  # type: ignore[assignment]
    made._done = {0: (3, SEEN)}
    return made


async def test_it_is_remembered_over_several_losses_of_the_lease() -> None:
    """The database goes away again before anything could be saved under the new epoch."""
    ours = pump()
    assert [await ours._furthest(0, epoch, SAVED) for epoch in (3, 4, 5)] == [SEEN] * 3


async def test_it_is_forgotten_when_another_worker_may_have_had_the_group() -> None:
    assert await pump()._furthest(0, 5, SAVED) == SAVED


class Taken(Ticks):
    """A history during whose telling another worker takes a group."""

    def __init__(self, ours: Pump) -> None:
        self._ours = ours

    async def latest(self) -> None:
        self._ours.drop(1)


async def test_a_group_that_another_worker_takes_meanwhile_ends_no_relay() -> None:
    ours = pump()
    ours._arrivals, ours._leaving, ours._wake = {}, set(), asyncio.Event()
    ours.groups = {shard: Group(shard, 3, SAVED, SAVED) for shard in (0, 1)}
    ours._p = SimpleNamespace(ticks=Taken(ours), meter=SimpleNamespace(lost={0: "behind", 1: "behind"}))  # type: ignore[assignment]
    await ours._take_stored(SimpleNamespace(stored=str(SEEN)))
    assert {shard: group.saved for shard, group in ours.groups.items()} == {0: SEEN}
