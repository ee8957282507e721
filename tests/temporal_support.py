"""What the tests of sagas on Temporal share: a desk with a client, a database, workers here and in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer, Worker

from soma_common.events.store import EventStore
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import decide
from soma_common.sagas.models import Saga
from soma_common.sagas.steps import Signal, SubSaga, Timer
from soma_common.sagas.values import Values, encode
from soma_common.temporal import client as temporal
from soma_common.temporal.sagas import TemporalSagas
from tests.core_support import opened
from tests.temporal_sagas import TABLE, Order, noted
from tests.waiting import until

ROOT = Path(__file__).parents[1]


@dataclass
class Desk:
    """Where a test works."""

    address: str
    dsn: str
    folder: Path
    queue: str
    client: Client
    store: EventStore

    @asynccontextmanager
    async def worker(self, *sagas: Saga, heartbeat: float = 1.0, **options: Any) -> AsyncIterator[TemporalSagas]:
        """A worker of this process."""
        made = TemporalSagas(self.store, sagas, heartbeat=heartbeat)
        worker = Worker(
            self.client,
            task_queue=self.queue,
            workflows=made.workflows,
            activities=made.activities,
            sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),
            **options,
        )
        async with worker:
            yield made
        await made.close()

    @contextmanager
    def process(self, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker in a process of its own (tests/temporal_worker.py), killed at the end."""
        command = [sys.executable, "-m", "tests.temporal_worker", self.address, self.queue, self.dsn, *args]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=env)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def order(self, **fields: Any) -> Order:
        """An order whose deeds are this test's."""
        return Order(folder=str(self.folder), **fields)

    async def start(self, saga: Saga, order: Order | None = None, **options: Any) -> WorkflowHandle[Any, Any]:
        """Start a saga on this desk's queue."""
        return await temporal.start(
            self.client, saga, order or self.order(), task_queue=self.queue, tenant_id="t", **options
        )

    async def entries(self, handle: WorkflowHandle[Any, Any]) -> list[tuple[str, str]]:
        """What the journal says, and of which step."""
        return [(entry["what"], entry.get("step", "")) for entry in (await temporal.journal(handle))["entries"]]

    async def stands(self, handle: WorkflowHandle[Any, Any], status: str) -> dict[str, Any]:
        """The journal, as soon as the saga stands so."""

        async def reached() -> dict[str, Any] | None:
            try:
                journal = await temporal.journal(handle)
            except RPCError as error:  # the next worker has not asked for work yet
                if error.status is not RPCStatusCode.FAILED_PRECONDITION:
                    raise
                return None
            return journal if journal["status"] == status else None

        found: dict[str, Any] = await until(reached, what=f"status {status}")
        return found

    async def deeds(self) -> list[str]:
        """The rows that transactional steps wrote."""
        return [row[0] for row in await self.store.pool.fetch("SELECT deed FROM deeds ORDER BY number")]

    def noted(self) -> list[str]:
        """The lines that external steps wrote."""
        return noted(self.folder)

    async def replayed(self, handle: WorkflowHandle[Any, Any], *sagas: Saga) -> None:
        """The workflow comes to the same commands when it is replayed from its history; raises if not."""
        made = TemporalSagas(self.store, sagas)
        await Replayer(workflows=made.workflows).replay_workflow(await handle.fetch_history())


@asynccontextmanager
async def desk_on(address: str, dsn: str, folder: Path) -> AsyncIterator[Desk]:
    """A desk with a queue of its own."""
    async with opened(dsn) as store:
        await store.pool.fetch(TABLE)
        client = await Client.connect(address)
        yield Desk(address, dsn, folder, f"queue-{uuid.uuid4().hex[:12]}", client, store)


def plain_run(saga: Saga, order: Order, signals: dict[str, bytes]) -> list[Entry]:
    """The machine alone, in memory: every attempt is made at once, and a step that raises failed for good."""
    journal, entries = Journal(), list[Entry]()
    values = Values(saga, encode(saga.input, order, "input"))
    while True:
        decision = decide(saga, journal)
        if decision.end is not None:
            return entries
        fresh = (
            [Entry(what=What.TURNED)]
            if decision.turn
            else [_outcome(values, w, journal, signals) for w in decision.begin[:1]]
        )
        entries.extend(fresh)
        journal = journal.after(*fresh)


def _outcome(values: Values, work: Any, journal: Journal, signals: dict[str, bytes]) -> Entry:
    part = work.part
    if isinstance(part, Timer | Signal):
        return Entry(what=What.DONE, step=work.path, result=signals.get(part.name))
    call = work.saga.undos[part.name] if work.undo else work.saga.calls[part.name]
    try:
        value = call.function(**values.arguments(call, work, journal, tx=None, context=None))
        if not call.blocking:
            value = _run(value)
    except Exception as error:
        return Entry(what=What.FAILED, step=work.path, error=str(error))
    if work.undo:
        return Entry(what=What.UNDONE, step=work.path)
    adapter = part.saga.input if isinstance(part, SubSaga) else work.saga.results[part.name]
    return Entry(what=What.DONE, step=work.path, result=encode(adapter, value, work.path))


def _run(coroutine: Any) -> Any:
    """A coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits for something")


def undone(entries: Sequence[Entry] | Sequence[tuple[str, str]]) -> list[str]:
    """The steps that were undone, in order."""
    pairs = [(e.what, e.step) if isinstance(e, Entry) else e for e in entries]
    return [step for what, step in pairs if what == What.UNDONE]
