"""Temporal's real development server, as a process of its own: built once per user by Go, from its pinned module."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soma_common.testing.lane.ports import LOOPBACK, free_port
from tests.go_program import go_program
from tests.waiting import wait_until

VERSION = "v1.5.1"  # of the command line tool, which holds server 1.29.1; the newest one that builds as a module
_MODULE = "github.com/temporalio/cli/cmd/temporal"


def program() -> Path:
    """Temporal's command line tool; built on the first call."""
    return go_program(_MODULE, VERSION)


@contextmanager
def temporal_server(folder: Path) -> Iterator[str]:
    """A server that keeps everything in memory; its address."""
    tool, port = str(program()), free_port()
    address = f"{LOOPBACK}:{port}"
    command = [tool, "server", "start-dev", "--ip", LOOPBACK, "--port", str(port), "--headless", "--log-level", "warn",
               "--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=400"]  # fmt: skip
    asked = [tool, "operator", "cluster", "health", "--address", address]
    with (folder / "temporal.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: subprocess.run(asked, capture_output=True).returncode == 0, what="Temporal's server")
            yield address
        finally:
            process.kill()
            process.wait()
