"""A process of the benchmark of sagas: the same work as workflows of DBOS, as its documentation recommends it.

Plain workflows are called by so many at once; those of a queue are enqueued before the clock starts, and the queue has
a ``worker_concurrency``. Transactional steps are those of a datasource ("the recommended approach"), READ COMMITTED as
ours are, since its default of SERIALIZABLE costs more. Settings that differ from its defaults favour it: the queue is
looked at every few milliseconds instead of every second, the datasource has a pool beside the one of the system
database, each as large as ours, and nothing is logged. Workflows are coroutines or plain functions in threads: the
caller measures both and takes the faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from dbos import DBOS, AsyncSQLAlchemyDatasource, DBOSConfig, SQLAlchemyDatasource
from sqlalchemy import text

from soma_common.garbage import calm_collector

POLL = 0.005  # seconds between two looks of a queue
QUEUE = "bench"
_TAKEN = "SELECT EXISTS (SELECT FROM dbos.workflow_status WHERE status <> 'ENQUEUED')"
_LEFT = "SELECT EXISTS (SELECT FROM dbos.workflow_status WHERE status <> 'SUCCESS')"
_INSERT = text("INSERT INTO effect (saga, step) VALUES (:saga, :step)")
Workflow = Callable[[int], Any]


def _plain(kind: str, dsn: str, connections: int) -> Workflow:
    """A workflow of functions, which DBOS runs in threads."""
    source = SQLAlchemyDatasource.create(dsn, engine_kwargs={"pool_size": connections, "max_overflow": 0})

    @source.transaction(isolation_level="READ COMMITTED")
    def transactional(number: int, step: int) -> None:
        source.sql_session().execute(_INSERT, {"saga": number, "step": step})

    @DBOS.step()
    def external(number: int, step: int) -> str:
        return f"receipt {number}-{step}"

    @DBOS.workflow(name="bench")
    def workflow(number: int) -> None:
        for place in (1, 2, 3):
            transactional(number, place) if kind == "transactional" else external(number, place)

    return workflow


def _coroutines(kind: str, dsn: str, connections: int) -> Workflow:
    """The same of coroutines."""
    settings = {"pool_size": connections, "max_overflow": 0}
    source = asyncio.run(AsyncSQLAlchemyDatasource.create(dsn, engine_kwargs=settings))

    @source.transaction(isolation_level="READ COMMITTED")
    async def transactional(number: int, step: int) -> None:
        await source.sql_session().execute(_INSERT, {"saga": number, "step": step})

    @DBOS.step()
    async def external(number: int, step: int) -> str:
        return f"receipt {number}-{step}"

    @DBOS.workflow(name="bench")
    async def workflow(number: int) -> None:
        for place in (1, 2, 3):
            await (transactional(number, place) if kind == "transactional" else external(number, place))

    return workflow


def _threads(workflow: Workflow, at_once: int, count: int) -> float:
    """Seconds for so many plain workflows, called by so many threads."""
    with ThreadPoolExecutor(at_once) as callers:
        start = time.perf_counter()
        list(callers.map(workflow, range(count)))
        return time.perf_counter() - start


async def _tasks(workflow: Workflow, at_once: int, count: int) -> float:
    """Seconds for so many coroutine workflows, called by so many tasks."""
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await workflow(number)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return time.perf_counter() - start


def _queued(dsn: str, workflow: Workflow, at_once: int, count: int) -> float:
    """Seconds from the moment at which the first of those that wait in a queue was taken from it."""
    for number in range(count):
        DBOS.enqueue_workflow(QUEUE, workflow, number)
    with psycopg.connect(dsn, autocommit=True) as watching:
        DBOS.register_queue(QUEUE, worker_concurrency=at_once, polling_interval_sec=POLL)  # found within a second
        while watching.execute(_TAKEN).fetchone() == (False,):
            time.sleep(0.01)
        start = time.perf_counter()
        while watching.execute(_LEFT).fetchone() == (True,):
            time.sleep(0.01)
        return time.perf_counter() - start


def main() -> None:
    """Run it and print as JSON how many seconds it took, and how many of CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dsn")
    parser.add_argument("kind", choices=("transactional", "external"))
    parser.add_argument("way", choices=("plain", "queue"))
    parser.add_argument("form", choices=("threads", "coroutines"))
    parser.add_argument("at_once", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("connections", type=int)
    given = parser.parse_args()
    config: DBOSConfig = {
        "name": "bench", "system_database_url": given.dsn, "sys_db_pool_size": given.connections,
        "log_level": "CRITICAL",
    }  # fmt: skip
    DBOS(config=config)
    make = _plain if given.form == "threads" else _coroutines
    workflow = make(given.kind, given.dsn, given.connections)
    DBOS.launch()
    print("ready", flush=True)
    with calm_collector():
        before = time.process_time()
        if given.way == "queue":
            seconds = _queued(given.dsn, workflow, given.at_once, given.count)
        elif given.form == "threads":
            seconds = _threads(workflow, given.at_once, given.count)
        else:
            seconds = asyncio.run(_tasks(workflow, given.at_once, given.count))
    print(json.dumps([seconds, time.process_time() - before]), flush=True)
    DBOS.destroy()


if __name__ == "__main__":
    main()
