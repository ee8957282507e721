"""A worker in a process of its own, which may kill itself at a chosen point of an activity.

``python -m tests.temporal_worker ADDRESS QUEUE DSN [NAME inside|after]``: it dies (SIGKILL) inside of the transaction
that writes the deed, or when the activity of this name has committed and Temporal has not heard of it yet.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from datetime import timedelta
from typing import Any

from temporalio import activity
from temporalio.client import Client
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor, Worker

from soma_common.temporal.sagas import TemporalSagas
from tests import temporal_sagas
from tests.core_support import opened

SOON = timedelta(seconds=1)  # in which a killed worker's workflows are another's


class Dying(Interceptor):
    """Dies around an activity."""

    def __init__(self, name: str, when: str) -> None:
        self.name, self.when = name, when

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:  # noqa: A002 - theirs
        return _Around(next, self)


class _Around(ActivityInboundInterceptor):
    def __init__(self, inner: ActivityInboundInterceptor, dying: Dying) -> None:
        super().__init__(inner)
        self._dying = dying

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002 - theirs
        result = await super().execute_activity(input)
        if activity.info().activity_type == self._dying.name and self._dying.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def dying_inside(name: str) -> None:
    """The process dies in the step's transaction, when its deed is written and not committed."""
    wrote = temporal_sagas.write

    async def write(tx: Any, ctx: Any, order: Any, deed: str) -> None:
        await wrote(tx, ctx, order, deed)
        if deed == name:
            os.kill(os.getpid(), signal.SIGKILL)

    temporal_sagas.write = write


async def main(address: str, queue: str, dsn: str, name: str = "", when: str = "") -> None:
    if when == "inside":
        dying_inside(name)
    async with opened(dsn) as store:
        sagas = [temporal_sagas.place_order, temporal_sagas.careful, temporal_sagas.brief, temporal_sagas.long_loop]
        made = TemporalSagas(store, sagas, heartbeat=1.0)
        client = await Client.connect(address)
        worker = Worker(
            client, task_queue=queue, workflows=made.workflows, activities=made.activities,
            sticky_queue_schedule_to_start_timeout=SOON, interceptors=[Dying(name, when)],
        )  # fmt: skip
        await worker.run()


asyncio.run(main(*sys.argv[1:]))
