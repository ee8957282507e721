"""What a pump has seen acknowledged while its cursors could not be saved."""

from __future__ import annotations

from types import SimpleNamespace

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
