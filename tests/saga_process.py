"""A worker of sagas in a process of its own, which tests pause and kill: python -m tests.saga_process DSN MODULE SETTINGS SECONDS.

The module has ``SAGAS``. The process prints ``ready`` when it runs.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from soma_common.service import run_until_signalled
from tests.saga_support import opened


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(self, dsn: str, module: str, *, stop_within: float = 30.0, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.saga_process", dsn, module, json.dumps(settings), f"{stop_within}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def wait(self, within: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(within)


@contextmanager
def working(dsn: str, module: str, **settings: Any) -> Iterator[WorkerProcess]:
    """A worker that is killed at the end, if it still runs."""
    process = WorkerProcess(dsn, module, **settings)
    try:
        yield process
    finally:
        process.kill()


async def _main(dsn: str, module: str, settings: str, stop_within: str) -> None:
    sagas = import_module(module).SAGAS
    async with opened(dsn, *sagas) as found:
        worker = found.worker(**json.loads(settings))
        asyncio.get_running_loop().call_soon(lambda: print("ready", flush=True))
        await run_until_signalled(worker, patience=float(stop_within))


def mark(dsn: str, text: str) -> None:
    """A line in the table ``done`` by a connection of its own: what happens outside of any transaction."""
    import psycopg

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO done (what) VALUES (%s)", (text,))


def seen(dsn: str, beginning: str) -> int:
    """How many lines of the table begin so."""
    import psycopg

    with psycopg.connect(dsn) as connection:
        found = connection.execute("SELECT count(*) FROM done WHERE starts_with(what, %s)", (beginning,)).fetchone()
        assert found is not None
        return int(found[0])


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
