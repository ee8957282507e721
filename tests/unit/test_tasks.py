"""Ending a task hides neither its error nor that the one who ends it is to end as well."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.service import Service
from soma_common.tasks import end


async def test_its_cancellation_is_its_end() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()


async def test_what_it_raised_is_raised() -> None:
    async def fails() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("on its way out")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="on its way out"):
        await end(task)


class Stubborn(Service):
    """Takes its time to end, whatever it is told."""

    def __init__(self) -> None:
        super().__init__("stubborn")
        self.cancelled, self.may_end = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Wait."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.may_end.wait()
            raise


async def test_whoever_is_cancelled_while_it_stops_a_service_is_cancelled() -> None:
    service = Stubborn()
    await service.start()
    await asyncio.sleep(0)

    async def stop_and_go_on() -> str:
        await service.stop(0.0)
        return "went on"

    stopping = asyncio.create_task(stop_and_go_on())
    await service.cancelled.wait()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    service.may_end.set()
